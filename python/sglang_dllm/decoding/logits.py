"""The logits of candidates, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from sglang_dllm.decoding.statistics import (
    DRAW_ELEMENTS,
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

Edit = Callable[[torch.Tensor, Candidates], torch.Tensor]
"""From logits ``(n, V)`` of some candidates to those that a client asked for.

It does not write to its input. Rows in which nothing is asked stay bit-equal.
"""

Measured = tuple[torch.Tensor, torch.Tensor]
"""The tokens ``(N,)`` int64 and a statistic ``(N,)`` float64 of N candidates."""


class Proposer(Protocol):
    """Chooses the tokens of some candidates together, instead of one by one.

    Attributes:
        candidates: ``(K,)`` int64, ascending: which of the N candidates.
    """

    candidates: torch.Tensor

    def edit(self, logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        """The last ``Edit`` of all: it forbids the tokens that are never chosen."""
        ...

    def tokens(self, logits_of: LogitsOf) -> torch.Tensor:
        """``(K,)`` int64: the tokens of these candidates.

        Args:
            logits_of: with all edits but its own.
        """
        ...


class HeadError(RuntimeError):
    """The model's head failed.

    It is part of the forward: with tensor parallelism the other ranks wait in its
    collectives, so nobody may go on as if one request had failed.
    """


class Logits:
    """Logits ``(N, V)`` of N candidates, by a function.

    The logits of all candidates of a batch would be the largest tensor of a server.
    Few enough of them (``fits_at_once``) are computed once and stay in memory.

    Clients may edit logits (``edited``), and may have the tokens of some candidates
    proposed together. Both come behind all that an algorithm does to the logits: an
    algorithm makes other logits of those ``before_edits``, with ``changed``.
    """

    def __init__(
        self,
        num_candidates: int,
        vocab_size: int,
        of: LogitsOf,
        edits: tuple[Edit, ...] = (),
        proposer: Proposer | None = None,
    ) -> None:
        """
        Args:
            of: the logits of some candidates, before the edits.
            edits: in their order.
        """
        self.num_candidates, self.vocab_size = num_candidates, vocab_size
        self._of, self._edits, self._proposer = of, edits, proposer
        self._proposed: torch.Tensor | None = None
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
        """``(n, V)``: the logits of some candidates, with all edits."""
        logits = self._before_proposer(some)
        return logits if self._proposer is None else self._proposer.edit(logits, some)

    def _before_proposer(self, some: Candidates) -> torch.Tensor:
        logits = self._of(some)
        for edit in self._edits:
            logits = edit(logits, some)
        return logits

    def before_edits(self, some: Candidates) -> torch.Tensor:
        """``(n, V)``: the logits of some candidates as no client edited them."""
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
        """Other logits of the same candidates, which get the same edits.

        Args:
            of: makes them of those ``before_edits``.
        """
        num, size = self.num_candidates, self.vocab_size
        return Logits(num, size, of, self._edits, self._proposer)

    def edited(self, edit: Edit) -> Logits:
        """The same logits with one edit more."""
        num, size = self.num_candidates, self.vocab_size
        return Logits(num, size, self._of, (*self._edits, edit), self._proposer)

    def proposed_by(self, proposer: Proposer) -> Logits:
        """The same logits with a proposer, and with its edit behind all others."""
        num, size = self.num_candidates, self.vocab_size
        return Logits(num, size, self._of, self._edits, proposer)

    def with_proposed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens ``(N,)`` int64 of all candidates, the proposed ones in their places.

        The tensor itself where nothing is proposed.
        """
        if self._proposer is None:
            return tokens
        if self._proposed is None:
            self._proposed = self._proposer.tokens(self._before_proposer)
        return tokens.index_put((self._proposer.candidates,), self._proposed)

    def measure(self, statistic: Statistic, mask_id: int) -> Measured:
        """The best token but the mask of each candidate, and a statistic.

        A proposed token takes the place of the best one, and is measured. The statistic
        is minus infinity where the logits have a NaN. There must be a candidate. Nobody
        may write to the tensors.
        """
        if statistic not in self._measured:
            parts = [
                measure(self(rows), mask_id, statistic)
                for rows in row_chunks(self.num_candidates, self.vocab_size)
            ]
            tokens, values = map(torch.cat, zip(*parts, strict=True))
            if self._proposer is not None:
                some = self._proposer.candidates
                tokens = self.with_proposed(tokens)
                if statistic.is_of_token:
                    value = self._value_of(statistic, some, tokens[some], mask_id)
                    values = values.index_put((some,), value)
            self._measured[statistic] = tokens, values
        return self._measured[statistic]

    def _value_of(
        self, statistic: Statistic, some: torch.Tensor, tokens: torch.Tensor,
        mask_id: int,
    ) -> torch.Tensor:  # fmt: skip
        """``(n,)`` float64: a statistic of given tokens ``(n,)`` of candidates."""
        found = [
            statistic.of(self(some[rows]).double().softmax(-1), tokens[rows], mask_id)
            for rows in row_chunks(len(some), self.vocab_size, DRAW_ELEMENTS)
        ]
        value = torch.cat([tokens.new_empty(0, dtype=torch.float64), *found])
        return value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def logprobs(
        self, some: torch.Tensor, tokens: torch.Tensor, mask_id: int, num_top: int = 0
    ) -> Logprobs:
        """Measure tokens ``(n,)`` at candidates ``(n,)``, one or more, and the best.

        No edit counts: they are the model's own.
        """
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
