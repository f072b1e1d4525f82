"""Tokenizers of checkpoints with remote code, in transformers' own classes.

SGLang loads the tokenizer in processes that load no plugin, so a registered class would
not exist there. The stand-in is therefore saved as a folder that every process can
read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

logger = logging.getLogger(__name__)

STAND_INS: dict[str, type[PreTrainedTokenizerBase]] = {
    # Dream's class is Qwen2's byte-level BPE. Its special tokens are in its files.
    "DreamTokenizer": Qwen2Tokenizer,
}


def plain_tokenizer_path(path: str, revision: str | None = None) -> str:
    """``path``, or a folder of the same tokenizer that needs no remote code.

    Args:
        path: tokenizer folder or hub name.
        revision: a revision of the hub repository.
    """
    name = get_tokenizer_config(path, revision=revision).get("tokenizer_class")
    stand_in = STAND_INS.get(str(name))
    if stand_in is None:
        return path
    tokenizer = stand_in.from_pretrained(path, revision=revision)
    # The folder is named by the content. A changed checkpoint must not find the old
    # tokenizer.
    state = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.chat_template}"
    folder = _cache() / hashlib.sha256(state.encode()).hexdigest()[:16]
    if not (folder / "tokenizer_config.json").exists():
        # Renamed when complete, or a second launch could read half a tokenizer.
        partial = folder.with_suffix(f".{os.getpid()}")
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return str(folder)


def tokenizer_of(loaded: Any, flags: Any) -> Any:
    """The tokenizer that SGLang has loaded, or else that of the checkpoint.

    A server with --skip-tokenizer-init has loaded none. Some algorithms need ids that
    only the tokenizer knows: the turn end, and newlines.

    Args:
        flags: the launch flags.

    Returns:
        None where the checkpoint has no tokenizer.
    """
    if loaded is not None:
        return loaded
    path, revision = flags.tokenizer_path or flags.model_path, flags.revision
    try:
        return AutoTokenizer.from_pretrained(
            plain_tokenizer_path(path, revision), revision=revision
        )
    except (OSError, ValueError) as error:
        logger.warning("%s has no tokenizer to read: %s", path, error)
        return None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "sglang-dllm" / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
