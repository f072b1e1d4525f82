"""SGLang's scheduler as far as our code reads it: real requests, pools and slots.

The model is a toy, there is no process and no HTTP. ``loop`` is one turn of SGLang's
event loop.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from benchmark.model_runner import no_prefix_cache
from helpers.toy_engine import FACTS, ToyEngine
from helpers.upstream_shapes import retract
from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.runtime import rounds
from sglang_dllm.runtime.round_log import RoundLog


class FakeScheduler:
    """The attributes of a scheduler, and what it sent to clients.

    Attributes:
        sent: of each request's rid, the number of tokens after each output.
        toy: the engine and its parts.
    """

    def __init__(
        self,
        slots: int = 100,
        max_running_requests: int = 4,
        max_prefill_tokens: int = 1000,
        context_len: int = 200,
        steps_per_round: int = 1,
        prelaunch: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.toy = ToyEngine(steps_per_round, prelaunch)
        self.engine = self.toy.engine
        self.req_to_token_pool = ReqToTokenPool(
            max_running_requests, context_len, "cpu", False
        )
        self.token_to_kv_pool_allocator = TokenToKVPoolAllocator(
            slots, torch.float32, "cpu", None, False
        )
        self.tree_cache = no_prefix_cache(
            self.req_to_token_pool, self.token_to_kv_pool_allocator
        )
        self.page_size = 1
        self.stream_interval = 1
        self.max_total_num_tokens = slots
        self.max_prefill_tokens = max_prefill_tokens
        self.max_running_requests = max_running_requests
        self.max_req_len = min(context_len, slots) - 1
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.tokenizer = tokenizer
        self.dllm_config = SimpleNamespace(
            needs_full_prefill=True, decode=DecodeConfig(FACTS.family, "LLaDA", {})
        )
        self.tp_worker = SimpleNamespace(
            dllm_algorithm=SimpleNamespace(
                engine_of=lambda scheduler: self.engine, round_log=RoundLog(1)
            ),
            model_runner=SimpleNamespace(
                model_config=SimpleNamespace(vocab_size=FACTS.vocab_size)
            ),
        )
        self.policy = SimpleNamespace(calc_priority=lambda waiting: None)
        self.metrics_reporter = SimpleNamespace(
            num_generated_tokens=0,
            forward_ct_decode=0,
            report_decode_stats=lambda *args, **kwargs: None,
        )
        self.output_streamer = SimpleNamespace(stream_output=self._send)
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)
        self.weight_updater = SimpleNamespace(scheduler=self, offload_tags=set())
        self.sent: dict[str, list[int]] = {}
        self.waiting_queue: list[Req] = []
        self.running_batch = SimpleNamespace(
            reqs=[], batch_is_full=False, is_empty=lambda: not self.running_batch.reqs
        )

    def _send(self, reqs: list[Req], return_logprob: bool) -> None:
        for req in reqs:
            req.send_token_offset = len(req.output_ids)
            self.sent.setdefault(req.rid, []).append(len(req.output_ids))

    def get_num_allocatable_reqs(self, running: int) -> int:
        free = self.req_to_token_pool.available_size()
        return min(self.max_running_requests - running, free)

    def queue(
        self,
        rid: str,
        length: Any = 8,
        prompt: tuple[int, ...] = (1, 2),
        dllm: Any = None,
        **params: Any,
    ) -> Req:
        """A request that no door has checked."""
        found = SamplingParams(
            temperature=0.0,
            custom_params={"dllm": dllm if dllm is not None else {"steps": 8}},
            **{"ignore_eos": True, **params},
        )
        found.normalize(self.tokenizer)
        found.max_new_tokens = length
        req = Req(rid, "", array("q", prompt), found)
        req.tokenizer = self.tokenizer
        self.waiting_queue.append(req)
        return req

    @property
    def running(self) -> list[str]:
        return [req.rid for req in self.running_batch.reqs]

    @property
    def free_slots(self) -> tuple[int, int]:
        """Free KV slots and request slots."""
        return (
            self.token_to_kv_pool_allocator.available_size(),
            self.req_to_token_pool.available_size(),
        )

    def loop(self, times: int = 1) -> None:
        for _ in range(times):
            batch = rounds.next_round(self, self.running_batch)
            if batch is not None:
                self.engine.run_round()
                rounds.finish_round(
                    self, batch, SimpleNamespace(can_run_cuda_graph=False)
                )

    def loop_to_end(self) -> None:
        for _ in range(500):
            if not self.running_batch.reqs and not self.waiting_queue:
                return
            self.loop()
        raise AssertionError("no end")

    def retract_all(self) -> None:
        """SGLang's own retraction of all running requests, as a pause makes it."""
        reqs, self.running_batch.reqs = self.running_batch.reqs, []
        for req in reqs:
            retract(req, self)
        self.waiting_queue += reqs


def end_of(req: Req) -> tuple[str, int | None, str]:
    """How a request ended: its type, the status code, the message."""
    assert req.finished_reason is not None, f"{req.rid} has not ended"
    found = req.finished_reason.to_json()
    status = found.get("status_code")
    return found["type"], status and int(status), found.get("message", "")
