"""Tokenizers of checkpoints with remote code, in transformers' own classes.

SGLang loads the tokenizer in processes that load no plugin, so a registered class would
not exist there. The stand-in is therefore saved as a folder that every process can
read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from sglang_dllm.errors import ConfigError
from sglang_dllm.user_folder import home_cache, temporary_folder

logger = logging.getLogger(__name__)

STAND_INS: dict[str, type[PreTrainedTokenizerBase]] = {
    # Dream's class is Qwen2's byte-level BPE. Its special tokens are in its files.
    "DreamTokenizer": Qwen2Tokenizer,
}

# Transformers reads vocab.json and merges.txt with these classes too, and gives added
# tokens the next free ids instead of theirs.
_MOVES_IDS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

_NEEDS_JSON = ("", "PreTrainedTokenizerFast", "TokenizersBackend")
_ANY_OF = ("tokenizer.json", "vocab.json", "tokenizer.model", "tiktoken.model")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def plain_tokenizer_path(path: str, revision: str | None = None) -> str:
    """``path``, or a folder of the same tokenizer that needs no remote code.

    Args:
        path: tokenizer folder or hub name.
        revision: a revision of the hub repository.

    Raises:
        ConfigError: the tokenizer's files are missing, broken, or contradict each
            other.
    """
    config = _read_config(path, revision)
    name = _class_name(config)
    stand_in = STAND_INS.get(name)
    if stand_in is None and name in _MOVES_IDS and not _has(path, "tokenizer.json"):
        stand_in = Qwen2Tokenizer
    if stand_in is None:
        if name in _NEEDS_JSON and os.path.isdir(path) and not _has_model(path):
            raise ConfigError(
                f"{path}: tokenizer_config.json names no class that reads vocab.json; "
                "expected a tokenizer.json"
            )
        if _remote_class(config) and not _is_known(name):
            raise ConfigError(
                f"{path}: tokenizer_config.json: the class {name} is code of the "
                "checkpoint, which is never run; expected a class of transformers, or "
                "--tokenizer-path"
            )
        return path
    try:
        tokenizer = stand_in.from_pretrained(path, revision=revision)
    except Exception as error:  # the Rust library raises no other class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: the tokenizer cannot be read: {reason}") from error
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    _keep_ids(state, _added_tokens(path, revision, config), path)
    return str(_saved(tokenizer, state))


def _read_config(path: str, revision: str | None) -> dict[str, Any]:
    if os.path.isdir(path) and not any(_has(path, name) for name in _ANY_OF):
        raise ConfigError(
            f"{path}: there is no tokenizer; expected one of {', '.join(_ANY_OF)}, or "
            "--tokenizer-path"
        )
    try:
        config: dict[str, Any] = get_tokenizer_config(path, revision=revision)
    except ValueError as error:
        raise ConfigError(f"{path}: tokenizer_config.json: {error}") from None
    return config


def _has(path: str, name: str) -> bool:
    return os.path.isfile(os.path.join(path, name))


def _has_model(path: str) -> bool:
    return any(_has(path, name) for name in _ANY_OF if name != "vocab.json")


def _class_name(config: Mapping[str, Any]) -> str:
    """The tokenizer's class; the remote one where only the remote code is named."""
    return str(config.get("tokenizer_class") or _remote_class(config).split(".")[-1])


def _remote_class(config: Mapping[str, Any]) -> str:
    """The class in a Python file of the checkpoint; empty where none is named."""
    named = config.get("auto_map") or {}
    # Older tools write the tokenizer's alone: a slow class and a fast one.
    remote = named.get("AutoTokenizer") if isinstance(named, dict) else named
    classes = [remote] if isinstance(remote, str) else remote or []
    return next((str(one) for one in classes if one), "")


def _is_known(name: str) -> bool:
    return any(hasattr(transformers, one) for one in (name, f"{name}Fast"))


def _added_tokens(
    path: str, revision: str | None, config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The added tokens with id and flags, by their text, as the files give them."""
    listed: dict[str, Any] = {}
    try:
        file = cached_file(
            path,
            "added_tokens.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if file is not None:
            listed = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = {}
    found = {text: {"id": int(token)} for text, token in listed.items()}
    for token, flags in (config.get("added_tokens_decoder") or {}).items():
        chosen = {name: flags[name] for name in _FLAGS if name in flags}
        found[flags["content"]] = {"id": int(token), **chosen}
    return found


def _keep_ids(
    state: dict[str, Any], wanted: Mapping[str, Mapping[str, Any]], path: str
) -> None:
    """Give the added tokens of a serialized tokenizer their own ids, in place.

    Behind a gap in the ids, transformers gives them the next free ones. An id in the
    vocabulary itself stays.

    Raises:
        ConfigError: two tokens have one id, or one token has two.
    """
    vocabulary = state["model"]["vocab"]
    owners = {token: text for text, token in vocabulary.items()}
    added = {token["content"]: token for token in state["added_tokens"]}
    for text, values in wanted.items():
        token = values["id"]
        if vocabulary.get(text, token) != token or owners.get(token, text) != text:
            other = owners.get(token, vocabulary.get(text))
            raise ConfigError(
                f"{path}: the tokenizer gives the added token {text!r} the id {token}, "
                f"and its vocabulary says {other!r}"
            )
        vocabulary[text], owners[token] = token, text
        flags = dict.fromkeys(_FLAGS, False) | {"special": True}
        added[text] = {"content": text, **flags, **added.get(text, {}), **values}
    for text, entry in added.items():
        if text not in wanted and wanted:
            if text not in vocabulary:
                raise ConfigError(
                    f"{path}: the tokenizer names the token {text!r} and gives it no id"
                )
            entry["id"] = vocabulary[text]
    state["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _saved(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> Path:
    """The folder of a tokenizer, saved if this is the first launch with it."""
    # The folder is named by the content. A changed checkpoint must not find the old
    # tokenizer.
    content = [
        state,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.model_max_length,
        transformers.__version__,
    ]
    text = json.dumps(content, sort_keys=True, default=str)
    folder = _cache() / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "tokenizer_config.json").exists():
        # Renamed when complete, or a second launch could read half a tokenizer.
        partial = folder.with_suffix(f".{os.getpid()}")
        tokenizer.save_pretrained(partial)
        _write(partial, state)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def _write(folder: Path, state: dict[str, Any]) -> None:
    """Put the tokenizer with its own ids into a saved folder."""
    text = json.dumps(state, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # Qwen2's class would build the tokenizer again, from the vocabulary.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("added_tokens_decoder", None)
    file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


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
    for base in (home_cache(), temporary_folder()):
        if base is None:
            continue
        folder = base / "sglang-dllm" / "tokenizers"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError("no folder for the tokenizer is writable; set XDG_CACHE_HOME")
