"""Our decoder and a ModelRunner in this process: rounds without scheduler and HTTP.

One per process: SGLang's parallel state is global.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from helpers.run_logits import load
from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.engine import FullAttnAlgorithm
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch, fill_ids


class InProcess:
    """Requests that are decoded together by the object the server runs rounds with."""

    def __init__(self, model_path: str, *flags: str) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        self.runner = load(model_path, *flags)
        config = self.runner.model_config.hf_config
        self.facts = ModelFacts.from_hf_config(config)
        self.rounds = FullAttnAlgorithm.__new__(FullAttnAlgorithm)
        self.rounds.arrivals = []
        self.rounds.decoder = self.decoder = Denoiser(self.facts)
        self.requests: list[Any] = []

    def add(
        self,
        prompt: Sequence[int],
        answer_len: int,
        algorithm: str,
        options: dict[str, Any],
        sampling: SamplingOptions | None = None,
        ignore_eos: bool = False,
    ) -> Canvas:
        """Take in a request; its slots are the runner's first free ones."""
        config = DecodeConfig(self.facts.family, algorithm, {})
        decoding = config.resolve(options, answer_len)
        settled = decoding.algorithm.complete(decoding.options, self.facts)
        canvas = Canvas.from_prompt(
            prompt,
            answer_len,
            mask_id=self.facts.mask_id,
            eos_ids=self.facts.eos_ids,
            ignore_eos=ignore_eos,
            ends_at_eos=not ignore_eos,
            has_cache=settled.cache != "none",
            num_rows=2 if decoding.algorithm.is_guided(settled) else 1,
            sampling=sampling,
        )
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        canvas.kv_slots = self.runner.token_to_kv_pool_allocator.alloc(len(canvas))
        if canvas.kv_slots is None:
            raise ValueError("the KV pool is too small for these canvases")
        self.rounds.admit(self.decoder.prepare(canvas, decoding.algorithm, settled))
        request = Req(str(id(canvas)), "", fill_ids(canvas), SamplingParams())
        request.dllm_algo_state = SimpleNamespace(canvas=canvas)
        used = {other.req_pool_idx for other in self.requests}
        request.req_pool_idx = next(i for i in range(1, 2 + len(used)) if i not in used)
        self.requests.append(request)
        return canvas

    def remove(self, canvases: Iterable[Canvas]) -> None:
        leaving = set(canvases)
        self.decoder.remove(list(leaving))
        for canvas in leaving:
            self.runner.token_to_kv_pool_allocator.free(canvas.kv_slots)
        self.requests = [
            r for r in self.requests if r.dllm_algo_state.canvas not in leaving
        ]

    def begin_round(self) -> Any:
        """What the scheduler does before a round: a batch, and SGLang's form of it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        runner = self.runner
        self.rounds.batch = CanvasScheduleBatch.init_new(
            self.requests,
            runner.req_to_token_pool,
            runner.token_to_kv_pool_allocator,
            None,
            runner.model_config,
            False,
            runner.spec_algorithm,
        )
        self.rounds.batch.prepare(self.decoder.pack())
        return ForwardBatch.init_new(
            self.rounds.batch, runner, return_hidden_states_before_norm=False
        )

    @torch.no_grad()
    def run_round(self, num_steps: int = 1, runs_ahead: bool = False) -> None:
        """Up to so many forwards, fewer where a canvas is done before; then those
        that are done leave."""
        self.rounds.num_steps, self.rounds.runs_ahead = num_steps, runs_ahead
        self.rounds.run(self.runner, self.begin_round())
        canvases = [request.dllm_algo_state.canvas for request in self.requests]
        for canvas in canvases:
            if canvas.failure:
                raise RuntimeError(canvas.failure)
        self.remove(canvas for canvas in canvases if canvas.done)
