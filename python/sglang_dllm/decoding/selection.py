"""Choosing among the candidates of a ragged batch: a few tensor operations, no loops.

Candidates of all canvases are packed: ``canvas_index`` ``(N,)`` int64 ascending. Ties
go to the first index.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.tensor_rows import indices, scalar_tensor


def ranks(
    value: torch.Tensor, canvas_index: torch.Tensor, num_canvases: int
) -> torch.Tensor:
    """Place of each candidate in its canvas, the greatest value first.

    Args:
        value: ``(N,)`` float, no NaN.

    Returns:
        ``(N,)`` int64 from 0.
    """
    best_first = value.sort(descending=True, stable=True).indices
    order = best_first[canvas_index[best_first].sort(stable=True).indices]
    counts = count(torch.ones_like(order, dtype=torch.bool), canvas_index, num_canvases)
    first = counts.cumsum(0) - counts
    place = indices(len(value), value.device)
    rank = torch.empty_like(order)
    rank[order] = place - first[canvas_index]
    return rank


def count(
    chosen: torch.Tensor, canvas_index: torch.Tensor, num_canvases: int
) -> torch.Tensor:
    """``(B,)`` int64: how many of each canvas's candidates are chosen."""
    total = torch.zeros(num_canvases, dtype=torch.int64, device=chosen.device)
    return total.index_add_(0, canvas_index, chosen.long())


def best_of_group(
    value: torch.Tensor, group: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """``(G,)``: the greatest value of each group, minus infinity of an empty one."""
    nothing = torch.full(
        (num_groups,), -torch.inf, dtype=value.dtype, device=value.device
    )
    return nothing.scatter_reduce(0, group, value, "amax")


def first_best(
    value: torch.Tensor,
    canvas_index: torch.Tensor,
    num_canvases: int,
    eligible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per canvas the first candidate of greatest value, as a mask ``(N,)``.

    Args:
        eligible: ``(N,)`` bool: the candidates to choose from. A canvas may have none.
            None for all.
    """
    num, device = len(value), value.device
    if eligible is not None:
        value = torch.where(eligible, value, scalar_tensor(-torch.inf, device))
    is_best = value == best_of_group(value, canvas_index, num_canvases)[canvas_index]
    if eligible is not None:
        is_best = is_best & eligible
    index, behind = indices(num, device), indices(num + 1, device)[num]
    first = behind.repeat(num_canvases).scatter_reduce_(
        0, canvas_index, torch.where(is_best, index, behind), "amin"
    )
    return first[canvas_index] == index
