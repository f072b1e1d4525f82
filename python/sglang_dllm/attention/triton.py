"""Canvas attention on our Triton kernel: for what FlashInfer does not run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from sglang_dllm.attention.base import (
    Kept,
    Write,
    graph_bucket,
    put,
    same_rows,
    slots_of,
)
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window
from sglang_dllm.kernels.canvas_attention import triton_canvas_attention


@dataclass
class _Forward:
    """What the kernel reads of one planned forward.

    Attributes:
        rows: for which; of a graph's bucket none are noted, they change with each plan.
        table: ``(R, 4)`` int32: a row's first token, its tokens, the tokens of its
            canvas, and where its slots begin in ``slots``, or -1 for a full row.
        slots: ``(K,)`` int32: the window rows' canvases in the pool, back to back.
        max_len: tokens of the longest row.
    """

    rows: Sequence[Window]
    table: torch.Tensor
    slots: torch.Tensor
    kept: Kept
    max_len: int


class TritonCanvasAttention:
    """Bidirectional attention of canvases' windows, planned once per forward.

    ``plan`` before the first layer, then ``run`` in every layer; ``plan(plan,
    graph=True)`` and CUDA graphs as in ``FlashInferCanvasAttention``. Triton compiles
    at the first run of a shape class, so a forward of a bucket must have run once
    before it is captured.
    """

    def __init__(self, device: torch.device | str, max_canvas_len: int) -> None:
        """
        Args:
            max_canvas_len: bounds the slots of one row under CUDA graphs.
        """
        self._device = torch.device(device)
        self._max_canvas_len = max_canvas_len
        self._eager: _Forward | None = None
        self._buckets: dict[tuple[int, int], _Forward] = {}
        self._forward: _Forward | None = None

    @classmethod
    def of(cls, backend: Any) -> TritonCanvasAttention:
        """The one that belongs to SGLang's ``TritonAttnBackend``, made once."""
        found = getattr(backend, "canvas_attention", None)
        if found is None:
            found = cls(backend.device, backend.max_context_len)
            backend.canvas_attention = found
        return found

    def plan(self, plan: AttentionPlan, graph: bool = False) -> None:
        """Prepare ``run`` for a forward; nothing is done again for the same rows.

        Args:
            graph: the forward is captured, or replayed: every row is a window of one
                length over the pool. Rows that only pad the batch, and positions
                that only pad a window, repeat others.

        Raises:
            ValueError: such a graph cannot run these rows.
        """
        self._forward = self._plan_graph(plan) if graph else self._plan_eager(plan)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        scale: float,
        write: Write | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        """One layer's attention of the planned tokens, as ``canvas.canvas_attention``.

        Args:
            q: ``(T, H, D)`` bf16, fp16 or fp32, the plan's windows back to back; D a
                power of two from 16 to 256.
            k, v: ``(T, H_kv, D)``, fresh, in the dtype of q.
            k_pool, v_pool: ``(S, H_kv, D)``, the layer's pool.
            scale: multiplies the dot products.
            write: puts kept keys and values there; by index where it is None. It must
                leave k and v as they are.
            k_scale, v_scale: what the pool's numbers are multiplied with.

        Returns:
            ``(T, H, D)`` in the dtype of q.
        """
        forward = self._forward
        assert forward is not None, "run without a plan"
        if forward.kept is not None:
            tokens, slots = forward.kept
            (write or put(k_pool, v_pool))(slots, k[tokens], v[tokens])
        return triton_canvas_attention(
            *(q, k, v, k_pool, v_pool, forward.table, forward.slots, forward.max_len),
            *(scale, 1.0 if k_scale is None else k_scale),
            1.0 if v_scale is None else v_scale,
        )

    def _plan_eager(self, plan: AttentionPlan) -> _Forward:
        rows = plan.windows
        if self._eager is not None and same_rows(rows, self._eager.rows):
            return self._eager
        is_window = [not row.is_full for row in rows]
        windows = [row for row, flag in zip(rows, is_window, strict=True) if flag]
        self._eager = _Forward(
            rows,
            _table(rows, is_window).to(self._device, non_blocking=True),
            _int32_slots(windows, self._device),
            plan.kept,
            max(plan.lens),
        )
        return self._eager

    def _plan_graph(self, plan: AttentionPlan) -> _Forward:
        bucket = num_rows, length = graph_bucket(plan)
        kept = plan.kept
        assert kept is not None
        if not isinstance(kept[0], slice) or len(kept[1]) != num_rows * length:
            raise ValueError("in a graph every token is kept")
        slots = _int32_slots(plan.windows, self._device)
        if len(slots) > num_rows * self._max_canvas_len:
            raise ValueError(f"canvases of more than {self._max_canvas_len} tokens")
        forward = self._buckets.get(bucket)
        if forward is None:
            forward = self._buckets[bucket] = self._new_bucket(num_rows, length)
        assert forward.kept is not None
        forward.table.copy_(_table(plan.windows, [True] * num_rows), non_blocking=True)
        forward.slots[: len(slots)].copy_(slots)
        forward.kept[1].copy_(kept[1])
        return forward

    def _new_bucket(self, num_rows: int, length: int) -> _Forward:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        # A row that happens to be full reads its fresh keys and values in the pool.
        return _Forward(
            (),
            zeros(num_rows, 4),
            zeros(num_rows * self._max_canvas_len),
            (slice(None), zeros(num_rows * length, dtype=torch.int64)),
            length,
        )


def _table(rows: Sequence[Window], is_window: Sequence[bool]) -> torch.Tensor:
    """``_Forward.table``, on the CPU."""
    lens = [row.num_tokens for row in rows]
    sizes = [
        row.canvas_len if flag else 0 for row, flag in zip(rows, is_window, strict=True)
    ]
    columns = zip(
        accumulate(lens[:-1], initial=0),
        lens,
        (row.canvas_len for row in rows),
        (
            at if flag else -1
            for at, flag in zip(
                accumulate(sizes[:-1], initial=0), is_window, strict=True
            )
        ),
        strict=True,
    )
    return torch.tensor(list(columns), dtype=torch.int32)


def _int32_slots(rows: Sequence[Window], device: torch.device) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, dtype=torch.int32, device=device)
    return torch.cat(slots_of(rows)).to(torch.int32)
