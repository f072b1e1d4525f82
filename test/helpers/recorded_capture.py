"""CUDA graphs on a CPU: tensor operations recorded once and replayed on their tensors.

As in a graph, nothing of Python runs in a replay, and what waits for the device or
brings values of the host is an error in a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from helpers.sync_detector import SyncDetector
from sglang_dllm.attention import sdpa as canvas
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.sdpa import canvas_attention
from sglang_dllm.runtime.graphs import Capture, Limits, Run, WindowGraphs


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
        return out  # the rest are views, which need no second run


class RecordedCapture:
    """A capture for ``WindowGraphs``. Graphs share memory: a replay leaves nothing of
    what another one computed."""

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


class FixedAttention:
    """Attention of windows that reads nothing but buffers of fixed size.

    Takes the place of ``canvas_attention`` and of what plans a backend's graphs.
    """

    def __init__(self, num_rows: int, canvas_len: int, window: int) -> None:
        self.slots = torch.zeros(num_rows, canvas_len, dtype=torch.int64)
        self.lens = torch.zeros(num_rows, dtype=torch.int64)
        self.written = torch.zeros(num_rows * window, dtype=torch.int64)
        self.planned: AttentionPlan | None = None

    def plan(self, plan: AttentionPlan, graph: bool = False) -> None:
        assert graph and len(set(plan.lens)) == 1 and plan.kept is not None
        self.planned = plan
        for index, row in enumerate(plan.windows):
            assert row.kv_slots is not None
            self.slots[index] = row.kv_slots[0]
            self.slots[index, : row.canvas_len] = row.kv_slots
            self.lens[index] = row.canvas_len
        self.written[: sum(plan.lens)] = plan.kept[1]

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if self.planned is None or plan.windows is not self.planned.windows:
            return canvas_attention(q, k, v, plan, k_pool, v_pool, scale)
        num_rows = len(plan.windows)
        written = self.written[: len(q)]
        k_pool[written] = k
        v_pool[written] = v
        slots = self.slots[:num_rows]
        sees = torch.arange(slots.shape[1]) < self.lens[:num_rows, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q.unflatten(0, (num_rows, -1)).transpose(1, 2),
            k_pool[slots].transpose(1, 2),
            v_pool[slots].transpose(1, 2),
            attn_mask=sees[:, None, None],
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1)


def turn_graphs_on(
    process: Any,
    limits: Limits,
    canvas_len: int,
    capture: Capture,
    **rounds: Any,
) -> WindowGraphs:
    """Graphs of an ``InProcess`` for canvases up to a length, and their attention.

    Args:
        rounds: how the engine runs rounds, as ``InProcess.new_engine`` takes it.
    """
    attention = FixedAttention(max(limits.batch_sizes), canvas_len, max(limits.windows))
    canvas.canvas_attention = attention  # type: ignore[assignment]
    graphs = WindowGraphs(
        process.runner.model,
        process.facts,
        attention,
        process.runner.attn_backend,
        limits,
        capture,
    )
    process.new_engine(graphs=graphs, **rounds)
    return graphs
