"""The object SGLang's worker calls to run a round."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.decoding.denoiser import Denoiser, Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graphs import WindowGraphs
from sglang_dllm.runtime.metrics import Metrics
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch


class FullAttnAlgorithm(DllmAlgorithm):
    """Runs a round: some forwards over canvases, each followed by what it commits.

    Attributes:
        decoder: the canvases; None until the scheduler has made it.
        metrics: what ended requests are counted in.
        batch: of the round that the scheduler has begun.
        graphs: run forwards of windows; None where there are none.
        num_steps: that the round commits, unless a canvas is done before.
        runs_ahead: launch the next round's first forward before the round ends, so
            that the device runs it while the scheduler does its part. Only where no
            canvas is done, and worth it only where a launch does not wait.
    """

    decoder: Denoiser | None = None
    metrics: Metrics
    batch: CanvasScheduleBatch
    graphs: WindowGraphs | None = None
    num_steps = 1
    runs_ahead = False
    _logits: Logits | None = None
    """Of the forward that runs."""
    _forward_batch: Any = None
    _in_graph = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.arrivals: list[Group] = []

    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: Any = None
    ) -> tuple[Any, list[Any], None, None, bool]:
        """A round of denoising steps.

        Args:
            forward_batch: made from ``batch``.
        """
        if self._logits is None:
            self._forward_batch = forward_batch
        # Else the forward that runs has one already. SGLang made this one, with
        # positions as if a window were the end of its canvas.
        for _ in range(self.num_steps):
            if self._has_ended():
                break
            if self._logits is None:
                self._launch(model_runner)
            self.land()
        if self.runs_ahead and not self._has_ended():
            self._launch(model_runner)
        return LogitsProcessorOutput(None), [], None, None, self._in_graph

    def land(self) -> None:
        """Commit what the forward that runs decides, if one does. CanvasBatch may leave
        the decoder only after that."""
        if self._logits is None:
            return
        assert self.decoder is not None
        logits, self._logits = self._logits, None
        self.decoder.commit(logits)
        del logits  # they may be many, and the next forward needs the memory
        self._join_arrivals()
        self._stage()
        self.decoder.sync()

    def admit(self, group: Group) -> None:
        """Take a canvas in: now, or when the forward in flight is committed."""
        self.arrivals.append(group)
        if self._logits is None:
            self._join_arrivals()
            assert self.decoder is not None
            self.decoder.sync()

    def _join_arrivals(self) -> None:
        assert self.decoder is not None
        for group in self.arrivals:
            self.decoder.join(group)
        self.arrivals.clear()

    def _stage(self) -> None:
        """Before the host waits: what the next forward reads, so that in most steps
        nothing but a launch is left to do then."""
        assert self.decoder is not None
        expected = self.decoder.expect()
        if self.graphs is None or expected is None:
            return
        if expected is not self.batch.layout:
            return
        plan = self.batch.plan()
        if self.graphs.accepts(plan):
            self.graphs.stage(plan, self._forward_batch, self.decoder.statistics)

    def _has_ended(self) -> bool:
        """Whether a canvas has something to be handed out before all go on."""
        return any(c.done or c.failure for c in self.batch.canvases)

    def _launch(self, model_runner: Any) -> None:
        """Run the next forward, which the host does not wait for."""
        decoder = self.decoder
        assert decoder is not None
        if self.batch.prepare(decoder.pack()):
            self._forward_batch = ForwardBatch.init_new(
                self.batch, model_runner, return_hidden_states_before_norm=False
            )
        layout, plan = self.batch.layout, self.batch.plan()
        forward_batch = self._forward_batch = CanvasForwardBatch.of(
            self._forward_batch, layout.input_ids, layout.positions, plan
        )
        self._in_graph = self.graphs is not None and self.graphs.accepts(plan)
        if self.graphs is not None and self._in_graph:
            self._logits = self.graphs.run(plan, forward_batch, decoder.statistics)
            return
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        # The forward batch tells SGLang's head nothing but the kind of forward.
        self._logits = Logits.of_hidden(
            out.logits_output.hidden_states,
            partial(model_runner.model.logits, forward_batch=forward_batch),
            decoder.facts.vocab_size,
        )
