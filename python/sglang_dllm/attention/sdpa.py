"""Canvas attention on torch's ``scaled_dot_product_attention``, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_dllm.attention.base import (
    CanvasAttention,
    LayerPool,
    PlannedForward,
    slots_of,
)
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window


@dataclass(frozen=True)
class _Run:
    """Neighbouring windows of one shape, which one call computes.

    Attributes:
        tokens: of the packed batch.
        slots: ``(num_windows * canvas_len,)`` int64: their canvases in the pool. None
            for full windows.
    """

    tokens: slice
    num_windows: int
    slots: torch.Tensor | None


@dataclass
class SDPAForward(PlannedForward):
    """The calls that one forward needs in every layer."""

    runs: list[_Run]


class SDPACanvasAttention(CanvasAttention[SDPAForward]):
    """Neighbouring windows of one shape run as one call; nothing is padded."""

    can_be_captured = False  # each plan has other tensors

    @classmethod
    def from_upstream(cls, backend: Any) -> SDPACanvasAttention:
        return cls(backend.device)

    def plan_windows(self, plan: AttentionPlan) -> SDPAForward:
        runs, first = [], 0
        for (length, _, is_full), same in groupby(plan.windows, _shape):
            windows = list(same)
            end = first + length * len(windows)
            slots = None if is_full else _cat(slots_of(windows))
            runs.append(_Run(slice(first, end), len(windows), slots))
            first = end
        return SDPAForward(plan.kv_writes, runs)

    def attend(
        self,
        forward: SDPAForward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        """As in the base class. Values may have another head size than keys."""
        parts = []
        for run in forward.runs:
            keys, values = k[run.tokens], v[run.tokens]
            if run.slots is not None:
                keys = _read(pool.keys, run.slots, pool.k_scale, k.dtype)
                values = _read(pool.values, run.slots, pool.v_scale, v.dtype)
            parts.append(attend(q[run.tokens], keys, values, run.num_windows, scale))
        return _cat(parts)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_windows: int,
    scale: float,
) -> torch.Tensor:
    """Attention of B windows of one shape, ``(B * Q, H, D)``.

    Args:
        q: ``(B * Q, H, D)`` for windows of Q tokens.
        k, v: ``(B * K, H_kv, D)`` for canvases of K tokens.
    """
    result = scaled_dot_product_attention(
        q.unflatten(0, (num_windows, -1)).transpose(1, 2),
        k.unflatten(0, (num_windows, -1)).transpose(1, 2),
        v.unflatten(0, (num_windows, -1)).transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result.transpose(1, 2).flatten(0, 1)


def _shape(window: Window) -> tuple[int, int, bool]:
    return window.num_tokens, window.canvas_len, window.is_full


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.cat``, without the copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _read(
    stored: torch.Tensor, slots: torch.Tensor, scale: float | None, dtype: torch.dtype
) -> torch.Tensor:
    # It takes a sixth of the time on a CPU. Not every torch has it for float8.
    rows = stored.index_select(0, slots) if stored.dtype == dtype else stored[slots]
    found = rows.to(dtype)
    return found if scale is None else found * scale
