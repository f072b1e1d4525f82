"""The object that SGLang's worker calls to run a round."""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.layers.logits_processor import LogitsProcessorOutput

from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.models.tokenizers import tokenizer_of
from sglang_dllm.runtime.agreement import agreement_of
from sglang_dllm.runtime.engine import DenoisingEngine
from sglang_dllm.runtime.graphs import compile_kernels, model_graphs
from sglang_dllm.runtime.metrics import Metrics
from sglang_dllm.runtime.model_forward import RunnerForward
from sglang_dllm.runtime.round_log import RoundLog
from sglang_dllm.runtime.step_clock import StepClock
from sglang_dllm.runtime.window_forward import ModelParts
from sglang_dllm.upstream.compat import in_effect


class FullAttnAlgorithm(DllmAlgorithm):
    """Owns the engine and runs its rounds.

    SGLang makes this object before it loads the model and the tokenizer. So the engine
    is built when the scheduler first asks for it, at the end of its own start-up.
    """

    # A newer SGLang ends a launch that names this class for another model.
    supported_architectures = tuple(FAMILIES)
    _engine: DenoisingEngine | None = None
    round_log: RoundLog

    def engine_of(self, scheduler: Any) -> DenoisingEngine:
        """The engine of the scheduler that owns this object."""
        if self._engine is None:
            self._engine = build_engine(scheduler)
            self.round_log = build_round_log(scheduler)
        return self._engine

    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: Any = None
    ) -> tuple[Any, list[Any], None, None, bool]:
        """One round of denoising steps.

        The arguments are SGLang's and not used: the engine packs its own forwards, and
        the first of a round may be in flight already.
        """
        assert self._engine is not None, "a round runs before the scheduler has started"
        self._engine.run_round()
        in_graph = self._engine.model.in_graph
        return LogitsProcessorOutput(None), [], None, None, in_graph


def build_round_log(scheduler: Any) -> RoundLog:
    """The log of rounds. One tensor-parallel rank writes it, as SGLang's own."""
    interval: int = in_effect(scheduler.server_args).decode_log_interval
    is_first = scheduler.metrics_collector_context.is_stats_logging_rank
    return RoundLog(interval if is_first else 0)


def build_engine(scheduler: Any) -> DenoisingEngine:
    """The engine of a scheduler whose model and tokenizer are loaded.

    Runs in the scheduler's process, so its settings reach no other model.
    """
    # SGLang copies the inputs of a forward to buffers as large as the KV pool. A guided
    # canvas computes two windows over the slots of one, which may be more than that.
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    config = scheduler.dllm_config
    flags = in_effect(scheduler.server_args)
    facts = config.facts.with_tokenizer(tokenizer_of(scheduler.tokenizer, flags))
    runner = scheduler.tp_worker.model_runner
    graphs = model_graphs(runner, flags, facts, config.decode.resolve({}))
    if graphs is None and scheduler.device == "cuda":
        compile_kernels(ModelParts.of(runner), facts)
    # Tensor-parallel ranks do the same, and one of them counts it.
    is_counting = scheduler.metrics_collector_context.current_scheduler_metrics_enabled
    metrics = Metrics(scheduler.metrics_collector if is_counting else None)
    prelaunch = config.decode.prelaunch
    if prelaunch is None:
        # On a CPU a launch is the forward itself and would only delay the tokens.
        prelaunch = scheduler.device != "cpu"
    agree = agreement_of(scheduler.tp_cpu_group)
    return DenoisingEngine(
        Denoiser(facts, scheduler.device, agree),
        RunnerForward(runner, facts.vocab_size, metrics, graphs, agree),
        metrics,
        config.decode.steps_per_round,
        prelaunch,
        StepClock(metrics, str(scheduler.device)) if metrics.is_on else None,
    )
