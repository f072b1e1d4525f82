"""Dataclasses of tensors with one row a canvas: how they are selected and joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Self, TypeAlias

import torch

Widths: TypeAlias = dict[str, torch.Size]
"""By field: the trailing sizes that one canvas needs."""


@dataclass
class TensorRows:
    """Tensors ``(R, ...)`` of R canvases. A subclass is a dataclass of such fields.

    A tensor is as wide as its widest canvas needs. The object remembers the trailing
    sizes that each canvas had when it was alone, so that the tensors get narrow again
    when a wide canvas leaves.
    """

    def __post_init__(self) -> None:
        self._widths: list[Widths] = []

    def widths(self) -> list[Widths]:
        """The trailing sizes of each canvas."""
        if not self._widths:
            tensors = self.tensors()
            assert all(len(tensor) == 1 for tensor in tensors.values())
            self._widths = [{name: t.shape[1:] for name, t in tensors.items()}]
        return self._widths

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_tensors(self, rest: Iterator[torch.Tensor]) -> Self:
        """The same canvases in the next tensors, in the order of ``tensors``."""
        moved = type(self)(**{name: next(rest) for name in self.tensors()})
        moved._widths = self._widths
        return moved

    def select(self, rows: Sequence[int], index: torch.Tensor) -> Self:
        """The canvases ``rows``, in that order.

        Args:
            index: ``rows`` as an int64 tensor on the device.
        """
        all_widths = self.widths()
        widths = [all_widths[row] for row in rows]
        selected = type(self)(
            **{
                name: narrowed(tensor[index], [one[name] for one in widths])
                for name, tensor in self.tensors().items()
            }
        )
        selected._widths = widths
        return selected

    def joined(self, other: Self) -> Self:
        """These canvases, then those of ``other``; narrow tensors are padded.

        Raises:
            TypeError: the two differ in class, dtype or number of dimensions. An
                algorithm from outside may return a state that changes.
        """
        mine, theirs = self.tensors(), other.tensors()
        if type(self) is not type(other):
            raise TypeError(f"{type(other).__name__} does not join {type(self)}")
        for name, tensor in mine.items():
            found = theirs[name]
            if (tensor.dtype, tensor.ndim) != (found.dtype, found.ndim):
                raise TypeError(
                    f"{type(self).__name__}.{name} is {found.dtype} with "
                    f"{found.ndim} dimensions; expected {tensor.dtype} with "
                    f"{tensor.ndim}"
                )
        joined = type(self)(
            **{name: stacked(tensor, theirs[name]) for name, tensor in mine.items()}
        )
        joined._widths = self.widths() + other.widths()
        return joined


def check_rows(rows: object, kind: type[TensorRows], num_rows: int) -> None:
    """Check what code from outside returned as its tensors.

    Raises:
        TypeError: it is not a ``kind``, or a field is not a tensor of that many rows.
    """
    if not isinstance(rows, kind):
        raise TypeError(f"expected a {kind.__name__}, not a {type(rows).__name__}")
    for name, tensor in rows.tensors().items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape[:1] != (num_rows,):
            raise TypeError(f"{kind.__name__}.{name} must have {num_rows} rows")


def narrowed(tensor: torch.Tensor, widths: Sequence[torch.Size]) -> torch.Tensor:
    """``(R, ...)`` cut to the greatest of the given trailing sizes."""
    widest = (slice(max(sizes)) for sizes in zip(*widths, strict=True))
    return tensor[(slice(None), *widest)]


def stacked(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rows on rows; the narrower one's trailing sizes are filled up with zeros."""
    if first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    widest = list(map(max, first.shape[1:], second.shape[1:]))
    return torch.cat([_padded(part, widest) for part in (first, second)])


def _padded(part: torch.Tensor, widest: Sequence[int]) -> torch.Tensor:
    pad: list[int] = []
    for size, most in zip(reversed(part.shape[1:]), reversed(widest), strict=True):
        pad += [0, most - size]
    return torch.nn.functional.pad(part, pad)


def first_true(values: torch.Tensor) -> torch.Tensor:
    """``(R,)`` int64: the first True in each row of ``(R, A)``, A if there is none."""
    length = values.shape[1]
    if length == 0:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)
    index = indices(length + 1, values.device)
    return torch.where(values, index[:length], index[length]).amin(dim=1)


@lru_cache(maxsize=None, typed=True)
def scalar_tensor(value: float, device: torch.device) -> torch.Tensor:
    """``()`` int64, or float64 for a float. Nobody may write to it.

    A literal in a tensor operation would be uploaded each time. The tensor stays for
    ever, because a captured step reads it. So the value must be one of the program's:
    lengths are entries of ``indices``.
    """
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def indices(length: int, device: torch.device) -> torch.Tensor:
    """``(length,)`` int64 from 0. Nobody may write to it."""
    return _power_of_two(length.bit_length(), device)[:length]


@cache
def _power_of_two(exponent: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1 << exponent, device=device)
