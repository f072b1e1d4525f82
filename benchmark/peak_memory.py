"""Peak memory of one denoising step above what lies there before it.

    python benchmark/peak_memory.py [--batch 16] [--canvas-len 512] \
        [--vocab-size 126464] [--hidden-size 64] [--drawn 1] [--case NAME ...] \
        [--json OUT]

A checkpoint of random weights with few small layers and a whole vocabulary is written
to a temporary folder; for each case a fresh process loads it with its KV pool, takes in
the canvases and runs one step in which (almost) every mask is a candidate. Printed:
peak resident memory minus that right before the step, when weights, pool and canvases
are there and the pool's pages have been touched; and the greatest of it in each stage.

Stages: `forward` is the model up to the final norm (that of these small layers, not of
a real checkpoint: see --hidden-size), `head` the logits of a part of the rows,
`measure` the best tokens and how sure they are, `draw` the tokens of canvases with a
temperature, `other` the rest of the step. What is alive when a stage begins counts for
it too. A draw goes over a part of the rows at a time, as the head does, and takes long:
of the batch only --drawn canvases have the temperature.

A large figure of all stages but `forward` is memory that malloc has not given back.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from local_server import run_command
from subprocess_worker import in_subprocess

from gsm8k import OneLineParser, at_least

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "Dream": ("Dream", {}, 0.0),
    "Dream, margin": ("Dream", {"alg": "topk_margin"}, 0.0),
    "FastDLLM": ("FastDLLM", {"steps": 1}, 0.0),
    "Credit": ("Credit", {"block_size": 512}, 0.0),
    "EntropyThreshold": ("EntropyThreshold", {"block_size": 512}, 0.0),
    "Dream, temperature 1": ("Dream", {}, 1.0),
    "Credit, temperature 1": ("Credit", {"block_size": 512}, 1.0),
}
"""Algorithm, options, temperature; on Dream, where FastDLLM has no blocks."""

PROMPT_LEN = 8
STAGES = ("forward", "head", "measure", "draw", "other")
MIB = 2**20


def write_checkpoint(path: Path, vocab_size: int, hidden_size: int) -> None:
    """Two layers, whose sizes matter to the stage `forward` only."""
    from helpers.tiny_checkpoints import write_dream

    write_dream(
        path,
        hidden_size=hidden_size,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 64),
        intermediate_size=3 * hidden_size,
        vocab_size=vocab_size,
    )


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class Watch:
    """The peak of resident memory in each stage, which begins and ends with a call."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(STAGES, 0)
        self.stage = "other"

    def note(self) -> None:
        """What has been the peak since the last time goes to the stage."""
        peak = status("VmHWM")
        self.peaks[self.stage] = max(self.peaks[self.stage], peak)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again

    def over(self, owner: Any, name: str, stage: str) -> None:
        """Calls of a function belong to a stage from now on."""
        function = getattr(owner, name)

        def watched(*args: Any, **others: Any) -> Any:
            self.note()
            before, self.stage = self.stage, stage
            try:
                return function(*args, **others)
            finally:
                self.note()
                self.stage = before

        setattr(owner, name, watched)


class Step:
    """The canvases of one case, before their first step."""

    def __init__(
        self, path: str, case: str, batch: int, canvas_len: int, drawn: int
    ) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "test"))
        from helpers.in_process import InProcess
        from sglang_dllm.decoding.canvas import SamplingOptions

        self.model = InProcess(
            path,
            *("--max-total-tokens", str(batch * canvas_len + 256)),
            *("--max-running-requests", str(batch + 1)),
        )
        pool = self.model.runner.token_to_kv_pool
        for buffer in [*pool.k_buffer, *pool.v_buffer]:
            buffer.zero_()
        algorithm, options, temperature = CASES[case]
        prompt = list(range(PROMPT_LEN))
        # A small step first: what is loaded and made once is not of the step.
        self.model.add(prompt, 4, algorithm, options)
        self.model.run_round()
        self.model.remove(self.model.decoder.canvases)
        for index in range(batch):
            sampling = SamplingOptions(temperature if index < drawn else 0.0)
            answer_len = canvas_len - PROMPT_LEN
            self.model.add(prompt, answer_len, algorithm, options, sampling)

    def run(self) -> dict[str, Any]:
        """One step: peaks above the memory before it, in bytes."""
        import ctypes

        from sglang_dllm.decoding import logits, prediction

        runner, decoder = self.model.runner, self.model.decoder
        num_candidates = sum(canvas.num_candidates for canvas in decoder.canvases)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        watch = Watch()
        watch.over(runner, "forward", "forward")
        watch.over(runner.model, "logits", "head")
        watch.over(logits, "measure", "measure")
        watch.over(prediction, "distribution", "draw")
        watch.over(prediction, "draw", "draw")
        watch.note()
        before, began = status("VmRSS"), perf_counter()
        watch.peaks = dict.fromkeys(STAGES, 0)
        self.model.run_round()
        watch.note()
        return {
            "before": before,
            "peak": max(watch.peaks.values()) - before,
            "stages": {k: max(0, v - before) for k, v in watch.peaks.items()},
            "candidates": num_candidates,
            "seconds": perf_counter() - began,
        }


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add, count = parser.add_argument, at_least(1, int)
    add("--batch", type=count, default=16)
    add("--canvas-len", type=at_least(16, int), default=512)
    add("--vocab-size", type=at_least(300, int), default=126464)
    add("--hidden-size", type=at_least(64, int), default=64)
    add("--drawn", type=count, default=1, help="canvases with the case's temperature")
    add("--case", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    add("--json", type=Path)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.vocab_size, args.hidden_size)
        for case in args.case:
            made = (folder, case, args.batch, args.canvas_len, args.drawn)
            with in_subprocess("peak_memory:Step", *made) as call:
                cases[case] = call("run")
    return {
        "batch": args.batch,
        "canvas_len": args.canvas_len,
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "peak": max(case["peak"] for case in cases.values()),
        "cases": cases,
    }


def show(figures: dict[str, Any]) -> str:
    stages = "".join(f"{stage:>9}" for stage in STAGES)
    lines = [f"{'MiB':<24}{'peak':>7}{stages}{'candidates':>12}{'seconds':>9}"]
    for name, case in figures["cases"].items():
        parts = "".join(f"{case['stages'][stage] / MIB:>9.0f}" for stage in STAGES)
        lines.append(
            f"{name:<24}{case['peak'] / MIB:>7.0f}{parts}"
            f"{case['candidates']:>12}{case['seconds']:>9.1f}"
        )
    lines.append(
        f"batch {figures['batch']}, canvas {figures['canvas_len']}, vocabulary "
        f"{figures['vocab_size']}, layers of {figures['hidden_size']}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parents[1] / "test"))
    return run_command("peak_memory.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
