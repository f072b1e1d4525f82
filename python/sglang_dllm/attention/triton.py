"""Canvas attention on our Triton kernel, for GPUs that FlashInfer does not run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dllm.attention.base import (
    CanvasAttention,
    LayerPool,
    PlannedForward,
    int32_slots,
)
from sglang_dllm.attention.plan import AttentionPlan, KVWrites
from sglang_dllm.decoding.window import Window
from sglang_dllm.kernels.canvas_attention import triton_canvas_attention


@dataclass
class TritonForward(PlannedForward):
    """The arguments of the kernel for one planned forward of B windows.

    Attributes:
        table: ``(B, 4)`` int32: of each window its first token, its tokens, the tokens
            of its canvas, and where its canvas begins in ``slots``. The last one is -1
            where the window reads its fresh keys and values.
        slots: ``(K,)`` int32: canvases in the pool, back to back.
        max_len: tokens of the longest window.
    """

    table: torch.Tensor
    slots: torch.Tensor
    max_len: int


class TritonCanvasAttention(CanvasAttention[TritonForward]):
    """One launch a layer. The head size must be a power of two from 16 to 256."""

    @classmethod
    def from_upstream(cls, backend: Any) -> TritonCanvasAttention:
        return cls(backend.device)

    def plan_windows(self, plan: AttentionPlan) -> TritonForward:
        in_pool = [not window.is_full for window in plan.windows]
        readers = [
            window for window, flag in zip(plan.windows, in_pool, strict=True) if flag
        ]
        table = _table(plan.windows, in_pool).to(self.device, non_blocking=True)
        slots = int32_slots(readers, self.device)
        return TritonForward(plan.kv_writes, table, slots, max(plan.lens))

    def new_bucket(
        self, num_windows: int, length: int, max_canvas_len: int, writes: KVWrites
    ) -> TritonForward:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        slots = zeros(num_windows * max_canvas_len)
        return TritonForward(writes, zeros(num_windows, 4), slots, length)

    def fill_bucket(self, bucket: TritonForward, plan: AttentionPlan) -> None:
        slots = int32_slots(plan.windows, self.device)
        table = _table(plan.windows, [True] * len(plan.windows))
        bucket.table.copy_(table, non_blocking=True)
        bucket.slots[: len(slots)].copy_(slots)

    def attend(
        self,
        forward: TritonForward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        return triton_canvas_attention(
            q,
            k,
            v,
            pool.keys,
            pool.values,
            forward.table,
            forward.slots,
            forward.max_len,
            scale,
            1.0 if pool.k_scale is None else pool.k_scale,
            1.0 if pool.v_scale is None else pool.v_scale,
        )


def _table(windows: Sequence[Window], in_pool: Sequence[bool]) -> torch.Tensor:
    """``TritonForward.table``, on the CPU.

    Args:
        in_pool: of each window, whether it reads its canvas from the pool.
    """
    lines, first, first_slot = [], 0, 0
    for window, reads_pool in zip(windows, in_pool, strict=True):
        at = first_slot if reads_pool else -1
        lines.append((first, window.num_tokens, window.canvas_len, at))
        first += window.num_tokens
        first_slot += window.canvas_len if reads_pool else 0
    return torch.tensor(lines, dtype=torch.int32)
