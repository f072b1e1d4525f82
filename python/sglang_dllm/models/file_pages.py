"""Pages of a checkpoint's files, which stay in memory beside the loaded copy."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class FilePages:
    """Gives back the pages of tensors that are parts of a mapped file.

    Loading copies each tensor. Until its file is closed, the pages that were read count
    as memory of this process: a second copy of the weights.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def release(self, tensor: torch.Tensor) -> None:
        """Give back the whole pages under a tensor that nobody has written to.

        A later read would read the file again. A tensor in other memory keeps its own.
        """
        if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
            return
        if tensor.nbytes < mmap.PAGESIZE or not tensor.is_contiguous():
            return
        first = tensor.data_ptr()
        last = first + tensor.nbytes
        if not (self._is_mapped(first, last) or self._read_maps(first, last)):
            return
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            _libc.madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED
            )

    def _is_mapped(self, first: int, last: int) -> bool:
        at = bisect_right(self._starts, first) - 1
        return at >= 0 and last <= self._ends[at]

    def _read_maps(self, first: int, last: int) -> bool:
        """Read the mappings again, as a file may have been opened since."""
        found = []
        for line in _MAPS.read_text().splitlines():
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path and path[0].endswith(_SUFFIXES):
                start, end = span.split("-")
                found.append((int(start, 16), int(end, 16)))
        self._starts = [start for start, _ in found]
        self._ends = [end for _, end in found]
        return self._is_mapped(first, last)


_libc = ctypes.CDLL(None)
