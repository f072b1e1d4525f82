"""What the policies read from the logits: best token and entropy per position."""

from __future__ import annotations

import torch

ENTROPY_EPS = 1e-12
"""Inside the logarithm, as in d3LLM; thresholds are nats over the full vocabulary."""

_CHUNK_ELEMENTS = 2**24
"""float64 elements held at once (128 MiB), whatever the number of positions."""


def argmax_and_entropy(
    logits: torch.Tensor, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token, the mask token excluded, and entropy, of each row.

    The entropy is d3LLM's: ``-sum p ln(p + 1e-12)`` in float64 over the whole row,
    padding and mask token included. A row with a NaN has infinite entropy, so that
    a broken row is never accepted before a sound one and never blocks progress.

    Args:
        logits: ``(N, V)`` float.
        mask_id: never predicted; a committed mask token would never be decoded.

    Returns:
        ``(N,)`` int64 token ids and ``(N,)`` float64 nats.
    """
    num_rows, vocab_size = logits.shape
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // vocab_size)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    entropy = torch.empty(num_rows, dtype=torch.float64, device=logits.device)
    for start in range(0, num_rows, rows_per_chunk):
        chunk = logits[start : start + rows_per_chunk]
        p = torch.softmax(chunk.double(), dim=-1)
        entropy[start : start + rows_per_chunk] = -(
            (p * (p + ENTROPY_EPS).log()).sum(dim=-1)
        )
        tokens[start : start + rows_per_chunk] = without_token(chunk, mask_id).argmax(
            dim=-1
        )
    return tokens, torch.nan_to_num(entropy, nan=torch.inf)


def without_token(logits: torch.Tensor, token_id: int) -> torch.Tensor:
    """A copy of ``(N, V)`` logits in which a token cannot be chosen."""
    logits = logits.clone()
    logits[:, token_id] = -torch.inf
    return logits
