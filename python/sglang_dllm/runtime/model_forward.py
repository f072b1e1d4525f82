"""The SGLang side of a forward: from a packed forward to the model or to a graph."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.agreement import Agree, Event, alone
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.runtime.engine import Statistics
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graphs import WindowGraphs
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch
from sglang_dllm.runtime.step_graphs import StepGraphs


class RunnerForward:
    """A ``ModelForward`` over SGLang's ModelRunner.

    Attributes:
        runner: SGLang's ModelRunner.
        graphs: run forwards of windows. None where there are none.
        steps: run whole steps. None where there are none.
        vocab_size: V of the logits.
        agree: of the tensor-parallel ranks.
        in_graph: whether the last forward ran in a graph.
    """

    def __init__(
        self,
        runner: Any,
        vocab_size: int,
        graphs: WindowGraphs | None = None,
        steps: StepGraphs | None = None,
        agree: Agree = alone,
    ) -> None:
        self.runner = runner
        self.vocab_size = vocab_size
        self.graphs, self.steps = graphs, steps
        self.agree = agree
        self.in_graph = False
        self._packed: PackedForward | None = None
        self._batch: CanvasForwardBatch | None = None

    def launch(self, packed: PackedForward, statistics: Statistics) -> Logits:
        """Start a forward: in a graph where one holds it, else through the runner."""
        plan = AttentionPlan(packed.windows, packed.logits_indices)
        batch = self._batch_of(packed, plan)
        self.in_graph = self.graphs is not None and self.graphs.accepts(plan)
        if self.graphs is not None and self.in_graph:
            return self.graphs.run(plan, batch, statistics)
        out = self.runner.forward(batch, pp_proxy_tensors=None)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            # An algorithm may ask for logits, and may fail before it does.
            self.agree(Event.HEAD)
            # SGLang's head reads nothing of the batch but the kind of forward.
            logits: torch.Tensor = self.runner.model.logits(hidden, batch)
            return logits

        return Logits.of_hidden(out.logits_output.hidden_states, head, self.vocab_size)

    def launch_step(self, group: Group) -> bool:
        """Start a captured step of a group, if a capture holds it."""
        if self.steps is None or not self.steps.launch(group):
            return False
        self.in_graph = True
        return True

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
