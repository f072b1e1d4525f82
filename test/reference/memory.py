"""A cached forward: a few rows of the canvas over a memory of all the others.

A *full* forward computes every row and remembers its keys and values. A *window*
[lo, hi) computes the rows lo to hi - 1 only. Their fresh keys and values replace the
remembered ones, then they attend to the keys and values of the whole canvas, before and
behind them alike: remembered ones, possibly of another token than is there by now, at
every position outside of the window. Only rows of the window have logits.

A model that can be decoded with a cache offers `new_memory()`, one `Memory` a request.
`reference.models` has it for transformers' modules. `TokenModel` makes it of any
function of the canvas, for tests of the decoding loops without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

LogitsFn = Callable[[torch.Tensor], torch.Tensor]


class Memory(Protocol):
    """The remembered canvas of one request.

    Logits are (L, V) and *usable*: row i predicts position i, in both families. Rows
    that no computed row gives are NaN, so that who reads one learns of it.
    """

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, V): compute all rows and remember them."""
        ...

    def window(self, ids: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """ids: (L,) int64, all of the canvas -> (L, V): compute rows lo to hi - 1."""
        ...


def shift_right(logits: torch.Tensor) -> torch.Tensor:
    """logits: (L, V) -> (L, V): rows L0, L0, L1, ..., L(n-2).

    Dream kept the next-token alignment of its autoregressive parent, so position i is
    read from row i-1 (Dream, `diffusion_generate`; d3LLM does the same).
    """
    return torch.cat([logits[:1], logits[:-1]])


def usable_rows(
    rows: torch.Tensor, lo: int, canvas_len: int, shift: bool
) -> torch.Tensor:
    """rows: (hi - lo, V), those of a window -> usable logits (L, V), NaN elsewhere."""
    nothing_before = rows.new_full((lo, rows.shape[1]), torch.nan)
    num_behind = canvas_len - lo - rows.shape[0]
    nothing_behind = rows.new_full((num_behind, rows.shape[1]), torch.nan)
    logits = torch.cat([nothing_before, rows, nothing_behind])
    return shift_right(logits) if shift else logits


def check_window(known_len: int | None, ids: torch.Tensor, lo: int, hi: int) -> None:
    """known_len: of the canvas that is remembered; None: there is none yet."""
    if known_len != len(ids):
        raise ValueError("a window needs a full forward of the same canvas before")
    if not 0 <= lo < hi <= len(ids):
        raise ValueError(f"rows {lo} to {hi} of a canvas of {len(ids)}")


def check_computed(row: torch.Tensor, position: int) -> None:
    """A decision may rest on computed logits only. row: (V,), that of a position."""
    if row.isnan().any():
        raise AssertionError(f"position {position} is outside of the window")


class TokenMemory:
    """The memory of a toy model: the token each position was last computed with.

    The memory of a real model, the keys and values of a position in every layer, here
    is that token alone; exact for a model of one layer.
    """

    def __init__(self, model: LogitsFn, family_shift: bool) -> None:
        """model: ids (L,) -> (L, V), row i of hidden state i, not shifted."""
        self.model, self.shift = model, family_shift
        self.ids: torch.Tensor | None = None

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids.clone()
        return self.window(ids, 0, len(ids))

    def window(self, ids: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        check_window(None if self.ids is None else len(self.ids), ids, lo, hi)
        assert self.ids is not None
        self.ids[lo:hi] = ids[lo:hi]
        rows = self.model(self.ids.clone())[lo:hi]
        return usable_rows(rows, lo, len(ids), self.shift)


class TokenModel:
    """A toy model as the algorithms take it, with and without a cache."""

    def __init__(self, model: LogitsFn, family_shift: bool) -> None:
        self.model, self.shift = model, family_shift

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.new_memory().full(ids)

    def new_memory(self) -> TokenMemory:
        return TokenMemory(self.model, self.shift)
