"""The logits of candidates, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from sglang_dllm.decoding.statistics import (
    Logprobs,
    Statistic,
    fits_at_once,
    logprobs_of,
    measure,
    row_chunks,
)

Candidates: TypeAlias = slice | torch.Tensor
"""Some of N candidates: a slice of step 1, or int64 indices."""

LogitsOf = Callable[[Candidates], torch.Tensor]
"""Logits ``(n, V)`` float of some candidates."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states ``(n, H)`` to logits ``(n, V)``."""

Measured = tuple[torch.Tensor, torch.Tensor]
"""The tokens ``(N,)`` int64 and a statistic ``(N,)`` float64 of N candidates."""


class HeadError(RuntimeError):
    """The model's head failed.

    It is part of the forward: with tensor parallelism the other ranks wait in its
    collectives, so nobody may go on as if one request had failed.
    """


class Logits:
    """Logits ``(N, V)`` of N candidates, by a function.

    The logits of all candidates of a batch would be the largest tensor of a server.
    Few enough of them (``fits_at_once``) are computed once and stay in memory.
    """

    def __init__(self, num_candidates: int, vocab_size: int, of: LogitsOf) -> None:
        """
        Args:
            of: the logits of some candidates.
        """
        self.num_candidates, self.vocab_size = num_candidates, vocab_size
        self._of = of
        self._measured: dict[Statistic, Measured] = {}

    @classmethod
    def of_hidden(cls, hidden: torch.Tensor, head: Head, vocab_size: int) -> Logits:
        """The head over hidden states ``(N, H)``."""

        def of(some: Candidates) -> torch.Tensor:
            wanted = hidden[some]
            try:
                return head(wanted)
            except Exception as error:
                raise HeadError(str(error)) from error

        num = len(hidden)
        return cls(num, vocab_size, _memoised(of, num, vocab_size))

    def __call__(self, some: Candidates) -> torch.Tensor:
        """``(n, V)``: the logits of some candidates."""
        return self._of(some)

    def part(self, first: int, num: int) -> Logits:
        """``num`` candidates from ``first`` on."""

        def of(some: Candidates) -> torch.Tensor:
            if isinstance(some, torch.Tensor):
                return self._of(some + first)
            start, stop, _ = some.indices(num)
            return self._of(slice(first + start, first + stop))

        return Logits(num, self.vocab_size, _memoised(of, num, self.vocab_size))

    def changed(self, of: LogitsOf) -> Logits:
        """Other logits of the same candidates, of which nothing is known."""
        return Logits(self.num_candidates, self.vocab_size, of)

    def measure(self, statistic: Statistic, mask_id: int) -> Measured:
        """The best token but the mask of each candidate, and a statistic.

        The statistic is minus infinity where the logits have a NaN. There must be a
        candidate. Nobody may write to the tensors.
        """
        if statistic not in self._measured:
            parts = [
                measure(self._of(rows), mask_id, statistic)
                for rows in row_chunks(self.num_candidates, self.vocab_size)
            ]
            tokens, values = zip(*parts, strict=True)
            self._measured[statistic] = torch.cat(tokens), torch.cat(values)
        return self._measured[statistic]

    def logprobs(
        self, some: torch.Tensor, tokens: torch.Tensor, mask_id: int, num_top: int = 0
    ) -> Logprobs:
        """Of tokens ``(n,)`` at candidates ``(n,)``, one or more, and of the best."""
        parts = [
            logprobs_of(self._of(some[rows]), tokens[rows], mask_id, num_top)
            for rows in row_chunks(len(some), self.vocab_size)
        ]
        values, top_ids, top_values = map(torch.cat, zip(*parts, strict=True))
        return values, top_ids, top_values


def _memoised(of: LogitsOf, num_candidates: int, vocab_size: int) -> LogitsOf:
    """Logits that are few enough are computed once."""
    if not fits_at_once(num_candidates, vocab_size):
        return of
    found: list[torch.Tensor] = []

    def memoised(some: Candidates) -> torch.Tensor:
        if not found:
            found.append(of(slice(0, num_candidates)))
        return found[0][some]

    return memoised
