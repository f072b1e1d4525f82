"""CUDA graphs on a CPU: tensor operations recorded once and replayed on their tensors.

As in a graph, no Python runs in a replay. An operation that waits for the device, or
that brings values of the host, is an error in a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from helpers.sync_detector import SyncDetector
from sglang_dllm.attention.base import LayerPool, slots_of
from sglang_dllm.attention.plan import AttentionPlan, KVWrites
from sglang_dllm.attention.sdpa import SDPACanvasAttention, SDPAForward
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.runtime.graph_capture import Capture, Run
from sglang_dllm.runtime.graph_grid import Bucket, GraphGrid
from sglang_dllm.runtime.graphs import CanvasGraphs
from sglang_dllm.runtime.window_forward import ModelParts


class _Recorder(SyncDetector):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::lift_fresh" and args[0].ndim:  # a number is an argument
            raise RuntimeError(f"{name} in a capture brings values of the host")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(aliases):
            written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.calls.append((func, args, kwargs or {}, written))
        elif any(alias is not None and alias.is_write for alias in aliases):
            self.calls.append((func, args, kwargs or {}, []))
        return out  # all others are views, which need no second run


class RecordedCapture:
    """A capture for ``CanvasGraphs``. Its graphs share memory, so each replay destroys
    the outputs of all others."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self._outputs: list[torch.Tensor] = []

    def __call__(self, run: Run) -> Run:
        self.num_captured += 1
        run()
        with _Recorder() as recorder:
            out = run()
        self._outputs += out

        def replay() -> tuple[torch.Tensor, ...]:
            self.num_replayed += 1
            for tensor in self._outputs:
                tensor.fill_(-1)
            for func, args, kwargs, written in recorder.calls:
                result = func(*args, **kwargs)
                tensors = [t for t in tree_leaves(result) if torch.is_tensor(t)]
                for old, new in zip(written, tensors, strict=bool(written)):
                    old.copy_(new)
            return out

        return replay


@dataclass
class FixedForward(SDPAForward):
    """Fixed buffers of B windows.

    Attributes:
        slots: ``(B, max_canvas_len)`` int64: each canvas's slots, the first one
            repeated behind the last.
        canvas_lens: ``(B,)`` int64.
    """

    slots: torch.Tensor
    canvas_lens: torch.Tensor


class FixedAttention(SDPACanvasAttention):
    """SDPA whose graphs read nothing but buffers of fixed size."""

    can_be_captured = True

    def new_bucket(
        self, num_windows: int, length: int, max_canvas_len: int, writes: KVWrites
    ) -> FixedForward:
        slots = torch.zeros(num_windows, max_canvas_len, dtype=torch.int64)
        lens = torch.zeros(num_windows, dtype=torch.int64)
        return FixedForward(writes, [], slots, lens)

    def fill_bucket(self, bucket: SDPAForward, plan: AttentionPlan) -> None:
        assert isinstance(bucket, FixedForward)
        for index, slots in enumerate(slots_of(plan.windows)):
            bucket.slots[index] = slots[0]
            bucket.slots[index, : len(slots)] = slots
            bucket.canvas_lens[index] = len(slots)

    def attend(
        self,
        forward: SDPAForward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        if not isinstance(forward, FixedForward):
            return super().attend(forward, q, k, v, pool, scale)
        slots = forward.slots
        is_key = (
            torch.arange(slots.shape[1], device=slots.device)
            < forward.canvas_lens[:, None]
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q.unflatten(0, (len(slots), -1)).transpose(1, 2),
            pool.keys[slots].transpose(1, 2),
            pool.values[slots].transpose(1, 2),
            attn_mask=is_key[:, None, None],
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1)


def make_graphs(
    runner: Any,
    facts: Any,
    grid: GraphGrid,
    canvas_len: int,
    capture: Capture,
    decoding: Decoding | None = None,
) -> CanvasGraphs:
    """Graphs of a ModelRunner on the CPU for canvases up to a length, captured. The
    runner's attention is replaced by one that can be captured.

    Args:
        decoding: whose steps are captured; None for graphs of forwards alone.
    """
    runner.attn_backend.canvas_attention = FixedAttention("cpu")
    graphs = CanvasGraphs(ModelParts.of(runner), facts, grid, canvas_len, capture)
    graphs.capture_grid(decoding)
    return graphs


def grid_of(batch_sizes: Sequence[int], lengths: Sequence[int]) -> GraphGrid:
    """All buckets of some windows and lengths, both ascending."""
    pairs = [Bucket(num, length) for length in lengths for num in batch_sizes]
    return GraphGrid(tuple(sorted(pairs, key=lambda one: one.num_tokens)))
