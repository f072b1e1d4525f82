"""The tokens that a request bans or prefers, as an edit of its canvas's logits.

``logit_bias``, ``allowed_token_ids``, ``min_tokens`` and the words of ``bad_words``.
docs/sampling.md has the rules, and the order of everything that changes logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from sglang_dllm.decoding.bad_words import Word, words_edit
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.logits import Candidates, Edit

Batch: TypeAlias = CanvasBatch[Any, Any]


@dataclass(frozen=True)
class TokenEdits:
    """What one request changes of its logits.

    Attributes:
        bias: tokens with a number that is added to their logits; minus infinity bans a
            token. No token occurs twice.
        allowed: the only tokens of the answer, None for all.
        min_tokens: as many first positions of the answer hold none of ``ends``.
        ends: the tokens that end an answer.
        words: sequences of two tokens or more that the answer does not have.
    """

    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    min_tokens: int = 0
    ends: tuple[int, ...] = ()
    words: tuple[Word, ...] = ()

    @property
    def forbids(self) -> bool:
        """True if some token, or a sequence of them, cannot be in the answer."""
        is_banned = any(value == -torch.inf for _, value in self.bias)
        has_limit = self.allowed is not None or self.min_tokens > 0
        return is_banned or has_limit or bool(self.words)

    def rows(self, vocab_size: int) -> torch.Tensor:
        """``(2, V)`` float32: what is added to the logits of a position, at
        ``min_tokens`` and behind, and in front of it."""
        fill = 0.0 if self.allowed is None else -torch.inf
        rows = torch.full((2, vocab_size), fill)
        if self.allowed is not None:
            rows[:, list(self.allowed)] = 0.0
        for token, value in self.bias:
            rows[:, token] += value
        rows[1, list(self.ends)] = -torch.inf
        return rows

    def safe_tokens(self, vocab_size: int, mask_id: int) -> torch.Tensor:
        """``(T,)`` int64: the tokens that every position may hold, whatever its
        neighbours are. A request without one could come to a position that has no
        token, and is refused.
        """
        row = self.rows(vocab_size)[1]
        row[[mask_id, *self.word_tokens]] = -torch.inf
        return (row > -torch.inf).nonzero()[:, 0]

    @property
    def word_tokens(self) -> Iterable[int]:
        return sorted({token for word in self.words for token in word})


class _Table(NamedTuple):
    """The rows of all canvases of a batch that have edits.

    Attributes:
        rows: ``(T, V)`` float32; row 0 is zeros.
        behind, before: ``(R,)`` int64: the row of each canvas at ``first`` and behind,
            and in front of it; 0 of a canvas without edits.
        first: ``(R,)`` int64: ``min_tokens``, from the start of the part that is
            decoded.
    """

    rows: torch.Tensor
    behind: torch.Tensor
    before: torch.Tensor
    first: torch.Tensor


def token_edits(inputs: StepInputs[Any, Any]) -> tuple[Edit, ...]:
    """The edits that the requests of a step ask for, in their order."""
    batch = inputs.batch
    if not inputs.num_candidates or not any(c.edits for c in batch.records):
        return ()
    table: _Table = batch.memo("token edits", lambda: _table_of(batch))
    is_before = inputs.positions < inputs.per_candidate(table.first)
    before, behind = map(inputs.per_candidate, (table.before, table.behind))
    row = torch.where(is_before, before, behind)

    def edit(logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        at = row[some]
        return torch.where((at > 0)[:, None], logits + table.rows[at], logits)

    of_words = words_edit(inputs)
    return (edit,) if of_words is None else (edit, of_words)


def _table_of(batch: Batch) -> _Table:
    size, device = batch.facts.vocab_size, batch.device
    rows = [torch.zeros((1, size), device=device)]
    behind, before, first = [], [], []
    for canvas in batch.records:
        edits = canvas.edits
        behind.append(0 if edits is None else 2 * len(rows) - 1)
        before.append(0 if edits is None else 2 * len(rows))
        gone = canvas.prompt_len - canvas.answer_start
        first.append(0 if edits is None else edits.min_tokens - gone)
        if edits is not None:
            rows.append(edits.rows(size).to(device, non_blocking=True))
    index = (
        torch.tensor(values).to(device, non_blocking=True)
        for values in (behind, before, first)
    )
    return _Table(torch.cat(rows), *index)
