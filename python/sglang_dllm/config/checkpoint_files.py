"""Refuses a folder that cannot be loaded as a checkpoint, seen from outside.

SGLang would find out in another process, some 20 seconds later, in a traceback. The
tensors themselves are the models' business.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sglang_dllm.errors import ConfigError

_FLAG = "--model-path"
_WITHOUT_FILES = ("dummy", "remote", "remote_instance")
"""Values of ``--load-format`` under which no file of weights is read."""


def check_folder(model_path: str) -> None:
    """Refuse a path without a checkpoint. The name of a repository passes.

    Raises:
        ConfigError: one line naming the path and what is wrong with it.
    """
    path = Path(model_path)
    if not path.exists():
        if path.is_absolute() or model_path.startswith((".", "~")):
            raise ConfigError(f"{_FLAG}={model_path!r}: there is no such folder")
        return
    if not path.is_dir():
        return
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"{_FLAG}={model_path!r}: the folder has no config.json")
    if not isinstance(_read_json(config), dict):
        raise ConfigError(f"{config}: expected a JSON object")


def check_weights(model_path: str, load_format: str) -> None:
    """Refuse a folder without weights, or with a file of weights that is cut off.

    Raises:
        ConfigError: one line naming the file.
    """
    folder = Path(model_path)
    if load_format in _WITHOUT_FILES or not folder.is_dir():
        return
    _check_index(folder / "model.safetensors.index.json")
    found = sorted(folder.glob("*.safetensors"))
    for file in found:
        _check_safetensors(file)
    others = (pattern for pattern in ("*.bin", "*.pt", "*.gguf"))
    if not found and not any(any(folder.glob(pattern)) for pattern in others):
        raise ConfigError(f"{_FLAG}={model_path!r}: the folder has no weights")


def _check_index(index: Path) -> None:
    if not index.is_file():
        return
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise ConfigError(f"{index}: expected a JSON object with a weight_map")
    for name in sorted({str(value) for value in names.values()}):
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index} names {name}, which is not in the folder")


def _check_safetensors(file: Path) -> None:
    """Compare the size of a file with the tensors that its header lists.

    The format: 8 bytes with the length of the header, the header as JSON, the data.
    """
    size = os.stat(file).st_size
    with file.open("rb") as stream:
        num = int.from_bytes(stream.read(8), "little")
        if size < 8 or num > size - 8:
            raise ConfigError(
                f"{file} has {size} bytes and is no whole safetensors file; it is cut "
                "off, or a pointer of Git LFS"
            )
        try:
            header = json.loads(stream.read(num))
            ends = [
                entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{file} is no safetensors file") from None
    expected = 8 + num + max(ends, default=0)
    if size < expected:
        raise ConfigError(
            f"{file} is cut off: it has {size} bytes, expected {expected}"
        )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
