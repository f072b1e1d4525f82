"""Measures of the logits of a position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from sglang_dllm.kernels.row_statistics import Want, row_statistics

HEAD_ELEMENTS = 2**25
"""Logits held at once, whatever the number of positions: 128 MiB in float32. Each part
reads the head's weights again, so parts are not smaller than memory asks for."""

DRAW_ELEMENTS = 2**22
"""Likewise where tokens are drawn: sorting takes some 80 bytes an element."""


_WANTED = {
    "probability": Want.PROBABILITY,
    "margin": Want.MARGIN,
    "negative_entropy": Want.NEGATIVE_ENTROPY,
}


@dataclass(frozen=True, order=True)
class Statistic:
    """A measure of a row of probabilities; the best position has the greatest value.

    ``probability``: of the predicted token. ``margin``: the difference of the two
    most likely tokens, the mask token excluded. ``negative_entropy``:
    ``sum p ln(p + eps)`` in nats over the whole row.
    """

    kind: Literal["probability", "margin", "negative_entropy"]
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _WANTED or not isinstance(self.eps, float):
            raise TypeError(f"{self} is no statistic; kinds are {', '.join(_WANTED)}")

    @property
    def is_of_token(self) -> bool:
        """True if it depends on the token, not on the whole row alone."""
        return self.kind == "probability"

    def of(self, p: torch.Tensor, tokens: torch.Tensor, mask_id: int) -> torch.Tensor:
        """``(N,)`` float64 from probabilities ``(N, V)`` float64, tokens ``(N,)``."""
        if self.kind == "negative_entropy":
            return (p * (p + self.eps).log()).sum(dim=-1)
        if self.kind == "margin":
            best = without_token(p, mask_id).topk(2, dim=-1).values
            return best[:, 0] - best[:, 1]
        return p.gather(1, tokens[:, None])[:, 0]


PROBABILITY = Statistic("probability")
MARGIN = Statistic("margin")


def check_statistics(statistics: Iterable[object]) -> tuple[Statistic, ...]:
    """The declaration of an algorithm, which may come from outside.

    Raises:
        TypeError: an element is no statistic.
    """
    found = tuple(statistics)
    for statistic in found:
        if not isinstance(statistic, Statistic):
            raise TypeError(f"statistics has {statistic!r}, which is no Statistic")
    return found  # type: ignore[return-value]


def measure(
    logits: torch.Tensor, mask_id: int, statistic: Statistic
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token but the mask of each row of ``(N, V)`` logits, and a measure.

    Returns:
        tokens ``(N,)`` int64 and values ``(N,)`` float64, minus infinity of a row
        with a NaN.
    """
    found = row_statistics(logits, mask_id, statistic.eps, _WANTED[statistic.kind])
    value = getattr(found, statistic.kind)
    return found.tokens, value


Logprobs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The log-probabilities ``(n,)`` float64 of n tokens, the ids ``(n, K)`` int64 of
the best tokens, best first, and the log-probabilities ``(n, K)`` float64 of those."""


def logprobs_of(
    logits: torch.Tensor, tokens: torch.Tensor, mask_id: int, num_top: int = 0
) -> Logprobs:
    """Measure tokens ``(N,)`` under logits ``(N, V)``, and the ``num_top`` best ones.

    The mask token has no share. Minus infinity of a row with a NaN.
    """
    parts = []
    for rows in row_chunks(len(tokens), logits.shape[1], DRAW_ELEMENTS):
        table = without_token(logits[rows].double(), mask_id).log_softmax(dim=-1)
        best = table.topk(num_top, dim=-1)
        parts.append((table.gather(1, tokens[rows, None]), best.indices, best.values))
    values, top_ids, top_values = map(torch.cat, zip(*parts, strict=True))
    return _no_nan(values[:, 0]), top_ids, _no_nan(top_values)


def _no_nan(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def row_chunks(
    num_rows: int, vocab_size: int, elements: int = HEAD_ELEMENTS
) -> Iterator[slice]:
    """Slices of rows whose logits are few enough to be held at once."""
    rows = max(1, elements // vocab_size)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def fits_at_once(num_rows: int, vocab_size: int) -> bool:
    """True if the rows make up one chunk."""
    return num_rows * vocab_size <= HEAD_ELEMENTS


def without_token(logits: torch.Tensor, token_id: int) -> torch.Tensor:
    """A copy of ``(N, V)`` logits in which a token cannot be chosen."""
    logits = logits.clone()
    logits[:, token_id] = -torch.inf
    return logits
