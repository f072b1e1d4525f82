"""Ranges of characters as ranges of the bytes of UTF-8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]

_SURROGATES = 0xD800, 0xDFFF
_LAST_OF_LENGTH = 0x7F, 0x7FF, 0xFFFF, 0x10FFFF


def byte_ranges(ranges: Iterable[Range]) -> Iterator[tuple[Range, ...]]:
    """Sequences of byte ranges, whose products are the characters of the ranges.

    Both ends of a range belong to it. Surrogates are no characters.
    """
    for low, high in ranges:
        if low <= _SURROGATES[1] and high >= _SURROGATES[0]:
            pieces = [(low, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, high)]
        else:
            pieces = [(low, high)]
        for start, end in pieces:
            if start <= end:
                yield from _of_one_length(start, end)


def _of_one_length(low: int, high: int) -> Iterator[tuple[Range, ...]]:
    for last in _LAST_OF_LENGTH:
        if low <= last < high:
            yield from _split(low, last)
            low = last + 1
    if low <= high:
        yield from _split(low, high)


def _split(low: int, high: int) -> Iterator[tuple[Range, ...]]:
    """The byte ranges of characters whose encodings have the same length."""
    first, last = chr(low).encode(), chr(high).encode()
    for num_tail in range(len(first) - 1, 0, -1):
        # The last bytes must run over all values unless the bytes before are equal.
        size = 1 << (6 * num_tail)
        if low // size != high // size:
            if low % size:
                end = low // size * size + size - 1
                yield from _split(low, end)
                yield from _split(end + 1, high)
                return
            if high % size != size - 1:
                end = high // size * size - 1
                yield from _split(low, end)
                yield from _split(end + 1, high)
                return
    yield tuple(zip(first, last, strict=True))
