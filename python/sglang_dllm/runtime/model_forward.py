"""The SGLang side of a forward: from a packed forward to the model or to a graph."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.attention.plan import AttentionPlan, forward_plan
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.window import Window
from sglang_dllm.runtime.engine import Statistics
from sglang_dllm.runtime.graphs import WindowGraphs
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch


class RunnerForward:
    """A ``ModelForward`` over SGLang's ModelRunner.

    Attributes:
        runner: SGLang's ModelRunner.
        graphs: run forwards of windows. None where there are none.
        vocab_size: V of the logits.
        in_graph: whether the last forward ran in a graph.
    """

    def __init__(
        self, runner: Any, vocab_size: int, graphs: WindowGraphs | None = None
    ) -> None:
        self.runner = runner
        self.vocab_size = vocab_size
        self.graphs = graphs
        self.in_graph = False
        self._packed: PackedForward | None = None
        self._windows: list[Window] = []
        self._forward_batch: Any = None

    def launch(self, packed: PackedForward, statistics: Statistics) -> Logits:
        """Start a forward: in a graph where one holds it, else through the runner."""
        if packed is not self._packed:
            self._prepare(packed)
        plan = self._fill(packed)
        self.in_graph = self.graphs is not None and self.graphs.accepts(plan)
        if self.graphs is not None and self.in_graph:
            return self.graphs.run(plan, self._forward_batch, statistics)
        with forward_plan(plan):
            out = self.runner.forward(self._forward_batch, pp_proxy_tensors=None)
        # SGLang's head reads nothing of the forward batch but the kind of forward.
        head = partial(self.runner.model.logits, forward_batch=self._forward_batch)
        return Logits.of_hidden(out.logits_output.hidden_states, head, self.vocab_size)

    def stage(self, packed: PackedForward, statistics: Statistics) -> None:
        """Fill the inputs of the graph that will run ``packed``.

        A packing that was not launched yet is left to ``launch``: its windows moved.
        """
        if self.graphs is None or packed is not self._packed:
            return
        plan = self._fill(packed)
        if self.graphs.accepts(plan):
            self.graphs.stage(plan, self._forward_batch, statistics)

    def _prepare(self, packed: PackedForward) -> None:
        """Make the forward batch of a new packing."""
        self._windows = windows_of(packed)
        batch = CanvasScheduleBatch.of_forward(self.runner, packed, self._windows)
        self._forward_batch = ForwardBatch.init_new(
            batch, self.runner, return_hidden_states_before_norm=False
        )
        self._packed = packed

    def _fill(self, packed: PackedForward) -> AttentionPlan:
        """Point the forward batch to the ids and positions of the next forward."""
        self._forward_batch.input_ids = packed.input_ids
        self._forward_batch.positions = packed.positions
        return AttentionPlan(self._windows, packed.logits_indices)


def windows_of(packed: PackedForward) -> list[Window]:
    """The windows as attention reads them."""
    return [
        Window(
            *row.canvas.window,
            len(row.canvas),
            row.canvas.kv_slots if row.canvas.has_cache else None,
        )
        for row in packed.rows
    ]
