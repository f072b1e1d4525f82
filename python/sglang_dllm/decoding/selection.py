"""d3LLM's unmasking rule over a ragged batch: a few tensor operations, no loops."""

from __future__ import annotations

import torch


def select_by_entropy(
    entropy: torch.Tensor,
    canvas_index: torch.Tensor,
    in_forced: torch.Tensor,
    threshold: torch.Tensor,
    inclusive: bool,
    global_minimum: bool,
) -> torch.Tensor:
    """Which candidates to commit.

    Accepted are candidates with an entropy below the threshold (or equal to it where
    inclusive), the lowest one of the canvas where global_minimum, and, where nothing
    inside the forced block was accepted, its lowest one. Ties go to the first index.

    Args:
        entropy: ``(N,)`` float64 nats; the candidates of all canvases, packed.
        canvas_index: ``(N,)`` int64, ascending: the canvas of each candidate.
        in_forced: ``(N,)`` bool: inside the canvas's first active block.
        threshold: ``(B,)`` float64 nats a canvas.
        inclusive, global_minimum: the family's rule (``families.Family``).

    Returns:
        ``(N,)`` bool.
    """
    num_canvases = len(threshold)
    limit = threshold[canvas_index]
    accepted = entropy <= limit if inclusive else entropy < limit
    if global_minimum:
        everywhere = torch.ones_like(in_forced)
        accepted |= _first_minimum(entropy, canvas_index, everywhere, num_canvases)
    num_progressed = torch.zeros(
        num_canvases, dtype=torch.int64, device=entropy.device
    ).index_add_(0, canvas_index, (accepted & in_forced).long())
    stuck = in_forced & (num_progressed == 0)[canvas_index]
    return accepted | _first_minimum(entropy, canvas_index, stuck, num_canvases)


def _first_minimum(
    values: torch.Tensor,
    group: torch.Tensor,
    eligible: torch.Tensor,
    num_groups: int,
) -> torch.Tensor:
    """Per group the first eligible element of least value, as a mask ``(N,)``."""
    index = torch.arange(len(values), device=values.device)
    least = torch.full(
        (num_groups,), torch.inf, dtype=values.dtype, device=values.device
    ).scatter_reduce(0, group, torch.where(eligible, values, torch.inf), "amin")
    first = torch.full(
        (num_groups,), len(values), dtype=torch.int64, device=values.device
    ).scatter_reduce(
        0,
        group,
        torch.where(eligible & (values == least[group]), index, len(values)),
        "amin",
    )
    return first[group] == index
