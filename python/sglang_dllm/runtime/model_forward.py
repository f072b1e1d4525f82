"""The SGLang side of a forward: from a packed forward to the model or to a graph."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.agreement import Agree, Event, alone
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graphs import CanvasGraphs
from sglang_dllm.runtime.metrics import Metrics
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch

logger = logging.getLogger(__name__)


class RunnerForward:
    """A ``ModelForward`` over SGLang's ModelRunner.

    Attributes:
        runner: SGLang's ModelRunner.
        vocab_size: V of the logits.
        metrics: counts launches.
        graphs: run forwards and whole steps. None where there are none.
        agree: of the tensor-parallel ranks.
        in_graph: whether the last forward ran in a graph.
    """

    def __init__(
        self,
        runner: Any,
        vocab_size: int,
        metrics: Metrics,
        graphs: CanvasGraphs | None = None,
        agree: Agree = alone,
    ) -> None:
        self.runner = runner
        self.vocab_size = vocab_size
        self.metrics = metrics
        self.graphs = graphs
        self.agree = agree
        self.in_graph = False
        self._packed: PackedForward | None = None
        self._batch: CanvasForwardBatch | None = None

    def launch(self, packed: PackedForward) -> Logits:
        """Start a forward: in a graph where one holds it, else through the runner."""
        graphs = self.graphs
        reason = "no_graphs" if graphs is None else graphs.why_eager(packed.canvases)
        self.in_graph = reason is None
        if graphs is not None and reason is None:
            self.metrics.launched("forward_graph")
            return self._logits(graphs.launch(packed), graphs.parts.template)
        self.metrics.launched("eager", reason or "")
        plan = AttentionPlan(packed.windows, packed.logits_indices)
        batch = self._batch_of(packed, plan)
        out = self.runner.forward(batch, pp_proxy_tensors=None)
        return self._logits(out.logits_output.hidden_states, batch)

    def launch_step(self, group: Group) -> bool:
        """Start a captured step of a group, if a capture holds it."""
        graphs = self.graphs
        if graphs is None or graphs.why_eager(group.records) is not None:
            return False
        if not graphs.launch_step(group):
            return False
        self.metrics.launched("step_graph")
        self.in_graph = True
        return True

    def weights_changed(self) -> None:
        """Drop the graphs, which read the weights where they were."""
        if self.graphs is not None and self.graphs.buckets:
            self.graphs.drop()
            logger.info("CUDA graphs are dropped: weights or KV pool change")

    def recapture(self) -> None:
        """Capture the graphs that were dropped."""
        if self.graphs is not None:
            self.graphs.recapture()

    def _logits(self, hidden: torch.Tensor, forward_batch: Any) -> Logits:
        """The logits of hidden states ``(N, H)``, which are computed when asked for."""

        def head(some: torch.Tensor) -> torch.Tensor:
            # An algorithm may ask for logits, and may fail before it does.
            self.agree(Event.HEAD)
            # SGLang's head reads nothing of the batch but the kind of forward.
            logits: torch.Tensor = self.runner.model.logits(some, forward_batch)
            return logits

        return Logits.of_hidden(hidden, head, self.vocab_size)

    def _batch_of(
        self, packed: PackedForward, plan: AttentionPlan
    ) -> CanvasForwardBatch:
        """The forward batch, which is made once for the same windows."""
        if self._batch is None or packed is not self._packed:
            schedule_batch = CanvasScheduleBatch.of_forward(self.runner, packed)
            made = ForwardBatch.init_new(
                schedule_batch, self.runner, return_hidden_states_before_norm=False
            )
            self._batch = CanvasForwardBatch.of(
                made, packed.input_ids, packed.positions, plan
            )
            self._packed = packed
        else:
            self._batch.point_to(packed.input_ids, packed.positions, plan)
        return self._batch
