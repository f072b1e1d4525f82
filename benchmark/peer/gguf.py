"""Writes the generated checkpoint as a GGUF file, by llama.cpp's own converter.

    python -m benchmark.peer.gguf LLAMA_CPP OUT

LLAMA_CPP is a folder with llama.cpp's source. The converter refuses tokenizers that it
does not know. A pre-tokenizer has no part in the time of a step: it gets GPT-2's.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import tempfile
from pathlib import Path

from benchmark.peer.checkpoint import write_checkpoint


def main(llama_cpp: Path, out: Path) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "model")
        sys.argv = ["convert_hf_to_gguf.py", str(model)]
        sys.argv += ["--outtype", "bf16", "--outfile", str(out)]
        runpy.run_path(str(llama_cpp / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
