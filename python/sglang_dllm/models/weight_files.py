"""Checks the weight files of a folder by their headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_dllm.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8


def check_weight_files(folder: Path) -> None:
    """Refuse a folder without weights, or with a file that is not whole.

    A download that was cut, or a Git LFS pointer instead of the file, would end the
    scheduler minutes later.

    Raises:
        ConfigError: the file, and its problem.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if files and index.is_file():
        files = [folder / name for name in _names_in(index)]
    if not files and not any(any(folder.glob(f"*.{kind}")) for kind in ("bin", "pt")):
        raise ConfigError(f"{folder}: there are no weights (*.safetensors or *.bin)")
    for file in files:
        _check_file(file)


def _names_in(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is no index of weights: {error!r}") from None


def _check_file(file: Path) -> None:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            start = _LENGTH_BYTES + length
            header: dict[str, Any] = (
                json.loads(opened.read(length)) if start <= size else {}
            )
        ends = [
            tensor["data_offsets"][1]
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ConfigError(f"{file} is not a safetensors file") from None
    wanted = start + max(ends, default=0)
    if wanted != size:
        raise ConfigError(
            f"{file} is not whole: it has {size} bytes, its header says {wanted}"
        )
