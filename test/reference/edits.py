"""Changes of logits that a request asks for (docs/sampling.md): lists and scalars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Edits:
    """The fields of one request. The words have at least two tokens."""

    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed: set[int] | None = None
    banned: set[int] = field(default_factory=set)  # bad words of one token
    min_tokens: int = 0
    ends: set[int] = field(default_factory=set)
    words: list[list[int]] = field(default_factory=list)

    def row(self, canvas: Any, row: torch.Tensor, position: int) -> torch.Tensor:
        """The logits (V,) of a position of a canvas, after the algorithm's changes."""
        row = row.clone()
        for token, value in self.logit_bias.items():
            row[token] += value
        for token in range(len(row)):
            at = position - canvas.prompt_len
            is_out = self.allowed is not None and token not in self.allowed
            is_early = at < self.min_tokens and token in self.ends
            if is_out or is_early or token in self.banned:
                row[token] = -torch.inf
        for word, start in self._places(canvas, position):
            others = [i for i in range(start, start + len(word)) if i != position]
            if all(self._has(canvas, i, word[i - start]) for i in others):
                row[word[position - start]] = -torch.inf
        return row

    def rows(self, canvas: Any, logits: torch.Tensor) -> torch.Tensor:
        """logits: (L, V) of a canvas -> the same after the edits."""
        logits = logits.clone()
        for i in range(canvas.prompt_len, len(canvas.ids)):
            logits[i] = self.row(canvas, logits[i], i)
        return logits

    def kept(
        self, canvas: Any, tokens: dict[int, int], logits: torch.Tensor, is_last: bool
    ) -> dict[int, int]:
        """The chosen tokens that a forward commits, by position.

        The last token of each word that they complete together waits, or becomes
        another one in the last forward. `logits` are those before the edits.
        """
        waits = set()
        for position in tokens:
            for word, start in self._places(canvas, position):
                span = range(start, start + len(word))
                new = [i for i in span if i in tokens]
                is_word = all(
                    tokens[i] == word[i - start]
                    if i in tokens
                    else self._has(canvas, i, word[i - start])
                    for i in span
                )
                if is_word:
                    waits.add(new[-1])
        if not is_last:
            return {i: token for i, token in tokens.items() if i not in waits}
        of_words = {token for word in self.words for token in word}
        kept = dict(tokens)
        for i in waits:
            row = self.row(canvas, logits[i], i)
            row[list(of_words)] = -torch.inf
            kept[i] = first_best(row, canvas.mask_id)
        return kept

    def _places(self, canvas: Any, position: int) -> Iterator[tuple[list[int], int]]:
        """Each word with each start in the answer that lets it cover a position."""
        for word in self.words:
            for start in range(position - len(word) + 1, position + 1):
                if start >= canvas.prompt_len and start + len(word) <= len(canvas.ids):
                    yield word, start

    @staticmethod
    def _has(canvas: Any, i: int, token: int) -> bool:
        return not canvas.is_masked(i) and canvas.ids[i] == token


NONE = Edits()


def first_best(row: torch.Tensor, mask_id: int) -> int:
    """The best token but the mask, the first of equals: topk and argmax do not say."""
    row = row.clone()
    row[mask_id] = -torch.inf
    return int((row == row.max()).nonzero()[0])
