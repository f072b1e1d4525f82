"""The dtype that a checkpoint's tensors have, without loading them."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

_OF_HEADER = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Names in the headers of safetensors. The dtypes of quantized weights (``F8_E4M3``,
``I32``) are not here: nobody multiplies by them as they are."""

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit. A file that is something else begins with any number."""


def stored_dtype(checkpoint: str, revision: str | None = None) -> torch.dtype | None:
    """The floating dtype of most bytes of a checkpoint.

    Args:
        checkpoint: a folder, or a repository of the hub. The headers of a repository
            are asked for where the files are not on this machine yet.

    Returns:
        None where there is no such tensor, or no file that can be read.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return _of_folder(folder)
    return _of_repository(checkpoint, revision)


def _of_folder(folder: Path) -> torch.dtype | None:
    num_bytes: Counter[torch.dtype] = Counter()
    # SGLang too reads the other files only where there are no safetensors.
    for pattern, read in (
        ("*.safetensors", _of_safetensors),
        ("*.bin", _of_pickle),
        ("*.pt", _of_pickle),
    ):
        for file in folder.glob(pattern):
            for dtype, num in read(file):
                num_bytes[dtype] += num
        if num_bytes:
            return num_bytes.most_common(1)[0][0]
    return None


def _of_safetensors(file: Path) -> Iterator[tuple[torch.dtype, int]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                return
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = [(entry["dtype"], entry["data_offsets"]) for entry in header.values()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error):
        return  # the loader will say it
    for name, (start, end) in found:
        if name in _OF_HEADER:
            yield _OF_HEADER[name], end - start


def _of_pickle(file: Path) -> Iterator[tuple[torch.dtype, int]]:
    try:
        tensors = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # training_args.bin and the like; the loader will say it
        return
    if not isinstance(tensors, dict):
        return
    for value in tensors.values():
        if isinstance(value, torch.Tensor) and value.dtype in _OF_HEADER.values():
            yield value.dtype, value.nbytes


def _of_repository(name: str, revision: str | None) -> torch.dtype | None:
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    try:
        cached = snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:  # not on this machine
        cached = None
    found = None if cached is None else _of_folder(Path(cached))
    if found is not None:
        return found
    try:
        counts = get_safetensors_metadata(name, revision=revision).parameter_count
    except Exception:  # no network, or no safetensors
        return None
    num_bytes: dict[torch.dtype, int] = {
        _OF_HEADER[kind]: num * _OF_HEADER[kind].itemsize
        for kind, num in counts.items()
        if kind in _OF_HEADER
    }
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default=None)
