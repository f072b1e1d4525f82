"""What the algorithms read from the logits of a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Statistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From probabilities ``(N, V)`` float64 and tokens ``(N,)`` to a value ``(N,)``;
the best position has the greatest value."""

_CHUNK_ELEMENTS = 2**24
"""float64 elements held at once (128 MiB), whatever the number of positions."""


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows whose float64 copy stays small."""
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def probability(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """That of the predicted token."""
    return p.gather(1, tokens[:, None])[:, 0]


def negative_entropy(eps: float) -> Statistic:
    """``sum p ln(p + eps)`` in nats over the whole row."""

    def statistic(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (p * (p + eps).log()).sum(dim=-1)

    return statistic


def margin(mask_id: int) -> Statistic:
    """Difference of the two most likely tokens, the mask token excluded."""

    def statistic(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        best = without_token(p, mask_id).topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    return statistic


def without_token(logits: torch.Tensor, token_id: int) -> torch.Tensor:
    """A copy of ``(N, V)`` logits in which a token cannot be chosen."""
    logits = logits.clone()
    logits[:, token_id] = -torch.inf
    return logits
