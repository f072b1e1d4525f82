"""The logits of candidates: computed when asked for, or known from the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from sglang_dllm.decoding.statistics import (
    Statistic,
    fits_at_once,
    measure,
    row_chunks,
)

Rows: TypeAlias = slice | torch.Tensor
"""Some of N candidates: a slice of step 1, or int64 indices."""

LogitsOf = Callable[[Rows], torch.Tensor]
"""Logits ``(n, V)`` float of some candidates."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states ``(n, H)`` to logits ``(n, V)``."""

Measured = tuple[torch.Tensor, torch.Tensor]
"""Of N rows the tokens ``(N,)`` int64 and a statistic ``(N,)`` float64."""


@dataclass(frozen=True)
class Logits:
    """Logits ``(N, V)`` by a function of rows: those of all candidates of a batch would
    be the largest tensor of a server. Few enough ones (``fits_at_once``) are held.

    Attributes:
        num_rows, vocab_size: N and V.
        of: the logits of some rows.
        measured: the statistics that the forward has computed already.
    """

    num_rows: int
    vocab_size: int
    of: LogitsOf
    measured: Mapping[Statistic, Measured] = field(default_factory=dict)

    @classmethod
    def of_hidden(cls, hidden: torch.Tensor, head: Head, vocab_size: int) -> Logits:
        """The head over hidden states ``(N, H)``."""
        num = len(hidden)
        return cls(num, vocab_size, _kept(lambda r: head(hidden[r]), num, vocab_size))

    def __call__(self, rows: Rows) -> torch.Tensor:
        return self.of(rows)

    def part(self, first: int, num: int) -> Logits:
        """``num`` rows from ``first`` on."""

        def of(rows: Rows) -> torch.Tensor:
            if isinstance(rows, torch.Tensor):
                return self.of(rows + first)
            start, stop, _ = rows.indices(num)
            return self.of(slice(first + start, first + stop))

        here = slice(first, first + num)
        measured = {
            statistic: (tokens[here], values[here])
            for statistic, (tokens, values) in self.measured.items()
        }
        kept = _kept(of, num, self.vocab_size)
        return Logits(num, self.vocab_size, kept, measured)

    def changed(self, of: LogitsOf) -> Logits:
        """Other logits of the same rows, of which nothing is known."""
        return Logits(self.num_rows, self.vocab_size, of)

    def measure(self, statistic: Statistic, mask_id: int) -> Measured:
        """Of each row the best token but the mask, and a statistic; minus infinity of
        a row with a NaN. Not to be written to."""
        if statistic in self.measured:
            return self.measured[statistic]
        parts = [
            measure(self.of(rows), mask_id, statistic)
            for rows in row_chunks(self.num_rows, self.vocab_size)
        ]
        tokens, values = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(values)


def _kept(of: LogitsOf, num_rows: int, vocab_size: int) -> LogitsOf:
    """Logits that are few enough are computed once."""
    if not fits_at_once(num_rows, vocab_size):
        return of
    found: list[torch.Tensor] = []

    def kept(rows: Rows) -> torch.Tensor:
        if not found:
            found.append(of(slice(0, num_rows)))
        return found[0][rows]

    return kept
