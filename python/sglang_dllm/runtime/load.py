"""Load: the tokens that canvases hold or will need, and who may go before whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.utils.common import ceil_align

from sglang_dllm.config.canvas_parts import CANVAS_KEY
from sglang_dllm.config.resolve import SCORE_KEY, dllm_object
from sglang_dllm.decoding.canvas import Canvas


@dataclass
class RoundLoad:
    """The windows and tokens of one forward over all active canvases.

    Attributes:
        max_tokens: the most tokens of a forward. One canvas may have more.
    """

    max_tokens: int
    windows: int = 0
    tokens: int = 0

    def add(self, canvas: Canvas) -> None:
        self.windows += canvas.num_windows
        self.tokens += canvas.num_windows * len(canvas)

    def has_room(self, canvas: Canvas, scheduler: Any) -> bool:
        """True if a canvas may join; one that runs alone always may."""
        if not self.windows:
            return True
        num_tokens = self.tokens + canvas.num_windows * len(canvas)
        # SGLang limits the windows of a forward by --max-running-requests.
        num_free = scheduler.get_num_allocatable_reqs(self.windows)
        return num_free >= canvas.num_windows and num_tokens <= self.max_tokens

    def room(self, scheduler: Any) -> int:
        """The most tokens that one more canvas may have."""
        if scheduler.get_num_allocatable_reqs(self.windows) < 1:
            return 0
        free: int = scheduler.token_to_kv_pool_allocator.available_size()
        return min(free, self.max_tokens - self.tokens)


def round_load(scheduler: Any, canvases: Iterable[Canvas]) -> RoundLoad:
    """The load of one forward over these canvases."""
    load = RoundLoad(min(scheduler.max_prefill_tokens, scheduler.max_total_num_tokens))
    for canvas in canvases:
        load.add(canvas)
    return load


def canvas_tokens(req: Req) -> int:
    """Tokens of the canvas of a waiting request: prompt and answer.

    A canvas whose length a rule finds has at most that many. A request that no door
    has checked may be wrong in any way, and then counts by ``max_new_tokens``.
    """
    if req.dllm_algo_state is not None:
        return len(req.dllm_algo_state.canvas)
    answer_len = _most_answer(req)
    parts = dllm_object(req.sampling_params.custom_params).get(CANVAS_KEY)
    if parts:
        try:
            # The model reads text behind the answer too.
            lens = [len(part.get("ids") or ()) or part["mask"] for part in parts]
            answer_len = sum(lens)
        except (AttributeError, KeyError, TypeError):
            pass
    return len(req.origin_input_ids) + answer_len


def waiting_tokens(reqs: Iterable[Req], page_size: int) -> int:
    """KV slots that waiting requests will need, in whole pages."""
    return sum(ceil_align(canvas_tokens(req), page_size) for req in reqs)


def most_left(reqs: Iterable[Req]) -> int:
    """The most masks that a running canvas has left: forwards until all have ended.

    A forward commits at least one mask of every canvas. The forwards of a score do not
    follow from its masks, so it counts as 0.
    """
    return max((_left(req.dllm_algo_state.canvas) for req in reqs), default=0)


def _left(canvas: Canvas) -> int:
    if canvas.scored is not None:
        return 0
    num = int(canvas.masked.sum())
    if canvas.max_forwards is not None:
        num = min(num, canvas.max_forwards - canvas.num_forwards)
    return num


def may_overtake(req: Req, left: int) -> bool:
    """True if a waiting request may pass one that does not fit.

    It may if it needs no more forwards than a running canvas may still need. So it
    ends no later than the canvases for which the other one waits anyway. It is asked
    before a canvas is made for the request, which costs device time.

    Args:
        left: ``most_left`` of the running requests.
    """
    asked = dllm_object(req.sampling_params.custom_params)
    # Dream may draw steps that commit nothing.
    steps = asked.get("steps")
    most = max(_most_answer(req), steps if isinstance(steps, int) else 0)
    return asked.get(SCORE_KEY) is None and most <= left


def _most_answer(req: Req) -> int:
    found = req.sampling_params.max_new_tokens
    return found if isinstance(found, int) else 0


def true_load(told: Any, inquirer: Any) -> Any:
    """SGLang's load of a rank, with the canvases that wait in place of their prompts.

    Args:
        told: SGLang's ``LoadSnapshot``. Its ``num_used_tokens`` are the slots that
            running canvases hold.
        inquirer: SGLang's, which has made it.
    """
    page_size = inquirer.token_to_kv_pool_allocator.page_size
    num_waiting = waiting_tokens(inquirer.get_waiting_queue(), page_size)
    total = told.num_used_tokens + num_waiting
    return msgspec.structs.replace(
        told,
        num_waiting_uncached_tokens=num_waiting,
        num_total_tokens=total,
        num_active_tokens=total,
    )
