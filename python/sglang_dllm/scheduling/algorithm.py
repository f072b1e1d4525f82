"""The object SGLang's worker calls to run a round."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.decoding.decoder import Decoder
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.forward_plan import forward_plan
from sglang_dllm.scheduling.batch import CanvasBatch
from sglang_dllm.scheduling.graphs import WindowGraphs
from sglang_dllm.scheduling.metrics import Metrics


class FullAttnAlgorithm(DllmAlgorithm):
    """Runs a round: some forwards over canvases, each followed by what it commits.

    Attributes:
        decoder: the canvases; None until the scheduler has made it.
        metrics: what ended requests are counted in.
        batch: of the round that the scheduler has begun.
        graphs: run forwards of windows; None where there are none.
        num_steps: forwards of the round, unless a canvas is done before.
    """

    decoder: Decoder | None = None
    metrics: Metrics
    batch: CanvasBatch
    graphs: WindowGraphs | None = None
    num_steps = 1

    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: Any = None
    ) -> tuple[Any, list[Any], None, None, bool]:
        """A round of denoising steps.

        Args:
            forward_batch: of the first step, made from ``batch``.
        """
        decoder = self.decoder
        assert decoder is not None
        for left in reversed(range(self.num_steps)):
            layout = self.batch.layout
            forward_batch.input_ids = layout.input_ids
            forward_batch.positions = layout.positions
            plan = self.batch.plan()
            in_graph = self.graphs is not None and self.graphs.accepts(plan)
            if self.graphs is not None and in_graph:
                logits = self.graphs.run(plan, forward_batch, decoder.statistics)
            else:
                with forward_plan(plan):
                    out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
                # The forward batch tells SGLang's head nothing but the kind of forward.
                logits = Logits.of_hidden(
                    out.logits_output.hidden_states,
                    partial(model_runner.model.logits, forward_batch=forward_batch),
                    decoder.facts.vocab_size,
                )
            decoder.commit(logits)
            del logits  # they may be many, and the next forward needs the memory
            if not left or any(c.done or c.failure for c in self.batch.canvases):
                break
            if self.batch.prepare(decoder.layout()):
                forward_batch = ForwardBatch.init_new(
                    self.batch, model_runner, return_hidden_states_before_norm=False
                )
        return LogitsProcessorOutput(None), [], None, None, in_graph
