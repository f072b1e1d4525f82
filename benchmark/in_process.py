"""The real engine, admission and emission over a ModelRunner, without HTTP.

The object stands for SGLang's scheduler: it has the attributes that our code reads.
One per process, as SGLang's parallel state is global.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmark.model_runner import load, no_prefix_cache
from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, DecodeConfig
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.admission import admit, leave
from sglang_dllm.runtime.agreement import agreement_of
from sglang_dllm.runtime.engine import DenoisingEngine
from sglang_dllm.runtime.metrics import Metrics
from sglang_dllm.runtime.model_forward import RunnerForward
from sglang_dllm.runtime.round_log import RoundLog
from sglang_dllm.runtime.rounds import finish_round, next_round


class InProcess:
    """Requests that are decoded together, as a server's scheduler does it."""

    def __init__(self, model_path: str, *flags: str, rank: int = 0) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        self.runner = runner = load(model_path, *flags, rank=rank)
        self.facts = ModelFacts.from_hf_config(runner.model_config.hf_config)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool_allocator = runner.token_to_kv_pool_allocator
        self.page_size = self.token_to_kv_pool_allocator.page_size
        self.tree_cache = no_prefix_cache(
            self.req_to_token_pool, self.token_to_kv_pool_allocator
        )
        self.spec_algorithm = runner.spec_algorithm
        self.tokenizer = None
        self.max_total_num_tokens = self.max_prefill_tokens = (
            runner.max_total_num_tokens
        )
        self.stream_interval = 1
        self.max_running_requests = runner.max_running_requests
        self.max_req_len = runner.model_config.context_len
        decode = DecodeConfig(self.facts.family, "FullAttnMultiBlock", {})
        self.dllm_config = SimpleNamespace(decode=decode)
        self.policy = SimpleNamespace(calc_priority=lambda waiting: None)
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)
        self.output_streamer = SimpleNamespace(stream_output=lambda reqs, logprob: None)
        self.metrics_reporter = SimpleNamespace(
            num_generated_tokens=0,
            forward_ct_decode=0,
            report_decode_stats=lambda *args, **kwargs: None,
        )
        self.weight_updater = SimpleNamespace(offload_tags=set())
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(reqs=[], batch_is_full=False)
        self.tp_worker = SimpleNamespace(
            model_runner=runner,
            dllm_algorithm=SimpleNamespace(
                engine_of=lambda scheduler: self.engine, round_log=RoundLog(0)
            ),
        )
        self.new_engine()

    def get_num_allocatable_reqs(self, running: int) -> int:
        free: int = self.req_to_token_pool.available_size()
        return min(self.max_running_requests - running, free)

    def new_engine(
        self,
        steps_per_round: int = 1,
        prelaunch: bool = False,
        graphs: Any = None,
    ) -> None:
        """Begin again with other rounds or other graphs. No request may be active."""
        from sglang.srt.distributed import get_tp_group

        assert not self.requests, "requests are being decoded"
        agree = agreement_of(get_tp_group().cpu_group)
        self.denoiser = Denoiser(self.facts, self.runner.device, agree)
        metrics = Metrics(None)
        self.model = RunnerForward(
            self.runner, self.facts.vocab_size, metrics, graphs, agree
        )
        self.engine = DenoisingEngine(
            self.denoiser, self.model, metrics, steps_per_round, prelaunch
        )

    @property
    def requests(self) -> list[Any]:
        return self.running_batch.reqs

    @torch.no_grad()
    def add(
        self,
        prompt: Sequence[int],
        answer_len: int,
        algorithm: str,
        options: dict[str, Any],
        sampling: SamplingOptions | None = None,
        ignore_eos: bool = False,
    ) -> Canvas:
        """Admit a request.

        Raises:
            ValueError: it does not fit, or it is refused.
        """
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        drawn = sampling or SamplingOptions()
        params = SamplingParams(
            max_new_tokens=answer_len,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=drawn.top_k or -1,
            sampling_seed=drawn.seed,
            ignore_eos=ignore_eos,
            custom_params={CUSTOM_PARAMS_KEY: {"algorithm": algorithm, **options}},
        )
        params.normalize(None)
        request = Req("in-process", "", array("q", prompt), params)
        self.waiting_queue.append(request)
        if not admit(self, self.engine, self.running_batch):
            self.waiting_queue.clear()
            reason = request.finished_reason
            raise ValueError(reason.message if reason else "the KV pool is too small")
        canvas: Canvas = request.dllm_algo_state.canvas
        return canvas

    def remove(self, canvases: Iterable[Canvas]) -> None:
        """Let requests go before their end."""
        ids = set(map(id, canvases))
        gone = [r for r in self.requests if id(r.dllm_algo_state.canvas) in ids]
        self.running_batch.reqs = [r for r in self.requests if r not in gone]
        leave(gone, self, self.engine)

    @torch.no_grad()
    def run_round(self) -> None:
        """One round, with the scheduler's part before and behind it.

        Raises:
            RuntimeError: an algorithm failed.
        """
        batch = next_round(self, self.running_batch)
        if batch is None:
            return
        canvases = [request.dllm_algo_state.canvas for request in batch.reqs]
        self.engine.run_round()
        finish_round(self, batch, SimpleNamespace(can_run_cuda_graph=False))
        for canvas in canvases:
            if canvas.failure is not None:
                raise RuntimeError(canvas.failure)
