"""Admission: a waiting request gets its canvas, its slots and its place in the engine.

Requests are checked when they arrive (``serving``). They are checked again here:
some entry points of SGLang bypass those checks, and one bad request must not end the
scheduler. An error here ends one request only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    Req,
    ScheduleBatch,
)

from sglang_dllm.config.canvas_parts import MASK, CanvasParts
from sglang_dllm.config.resolve import (
    CUSTOM_PARAMS_KEY,
    given_canvas,
    request_options,
    watching_of,
)
from sglang_dllm.config.scoring import given_scoring
from sglang_dllm.config.token_fields import token_edits_of
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.guard import Guard, message_of, text_of
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.errors import ConfigError, RequestError
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.engine import DenoisingEngine
from sglang_dllm.runtime.forms import give_form
from sglang_dllm.runtime.load import (
    canvas_tokens,
    may_overtake,
    most_left,
    round_load,
)
from sglang_dllm.runtime.logprobs import begin_logprobs, send
from sglang_dllm.runtime.report import RequestReport
from sglang_dllm.runtime.sampling import sampling_of
from sglang_dllm.runtime.schedule_batch import (
    fill_ids,
    release_canvas_slots,
    try_alloc_canvas_slots,
)
from sglang_dllm.upstream.compat import set_extent

logger = logging.getLogger(__name__)


@dataclass
class Denoising:
    """The state that a request carries in ``dllm_algo_state``.

    Attributes:
        decoding: for a canvas of any length.
        group: the canvas with its state, ready for the engine. None while the engine
            has it.
        stop_ids: the tokens at which SGLang's own rules may end the request.
        stream_interval: a stream gets an output whenever it has so many new tokens.
        report: says where a stream has more to send. None for a request without one.
        began: when this was made, in seconds of ``time.monotonic``.
    """

    canvas: Canvas
    decoding: Decoding
    group: Group | None
    stop_ids: frozenset[int]
    stream_interval: int = 1
    report: RequestReport | None = None
    began: float = field(default_factory=time.monotonic)

    def resize(self, engine: DenoisingEngine) -> None:
        """Change the canvas's length as it asks for, and keep it until it has slots.

        Raises:
            Exception: whatever the algorithm raises.
        """
        self.group = engine.resize(self.canvas, self.decoding)


def admit(
    scheduler: Any, engine: DenoisingEngine, running_batch: ScheduleBatch
) -> list[Req]:
    """Move waiting requests to the running batch, in the scheduler's order.

    A canvas is admitted while a request slot and its KV slots are free, and while a
    forward over all canvases stays within --max-running-requests windows and
    --max-prefill-tokens tokens. A canvas that runs alone may exceed the tokens. A
    request may pass one that does not fit where it cannot make it wait longer
    (``load.may_overtake``; docs/overload.md has the bounds). A canvas that waits for
    slots to grow comes before them all. If the engine is empty and a request still
    does not fit, it is refused.

    Returns:
        The admitted requests.
    """
    running = running_batch.reqs
    grown_wait = any(req.dllm_algo_state.group for req in running)
    if not scheduler.waiting_queue or grown_wait:
        return []
    scheduler.policy.calc_priority(scheduler.waiting_queue)
    load = round_load(scheduler, [r.dllm_algo_state.canvas for r in running])
    admitted: list[Req] = []
    ended: list[Req] = []
    blocked, left, room = False, 0, 0
    for req in scheduler.waiting_queue:
        if blocked:
            if room < 1:
                break
            # Asked first: to make a canvas costs device time and memory.
            if canvas_tokens(req) > room or not may_overtake(req, left):
                continue
        canvas = canvas_of(req, scheduler, engine)
        if canvas is None:
            ended.append(req)
            continue
        fits = load.has_room(canvas, scheduler)
        if fits and try_alloc_canvas_slots(req, canvas, scheduler):
            enter(req, engine)
            admitted.append(req)
            load.add(canvas)
        elif load.windows:
            blocked, left = True, left or most_left([*running, *admitted])
        else:
            error = RequestError(f"a canvas of {len(canvas)} tokens does not fit")
            _end(req, error, engine)
            ended.append(req)
        if blocked:
            room = load.room(scheduler)
    taken = {id(req) for req in (*admitted, *ended)}
    scheduler.waiting_queue = [r for r in scheduler.waiting_queue if id(r) not in taken]
    running_batch.reqs = running_batch.reqs + admitted
    if ended:
        send(scheduler, ended)
    return admitted


def enter(req: Req, engine: DenoisingEngine) -> None:
    """Give the canvas of a request that has its slots to the engine."""
    state: Denoising = req.dllm_algo_state
    assert state.group is not None, "the engine has this canvas already"
    set_extent(req, len(state.canvas))
    engine.admit(state.group)
    state.group = None


def leave(reqs: Collection[Req], scheduler: Any, engine: DenoisingEngine) -> None:
    """Take the canvases of ended requests out of the engine and free their slots."""
    # In this order: the forward in flight still writes to the slots.
    engine.release([req.dllm_algo_state.canvas for req in reqs])
    for req in reqs:
        release_canvas_slots(req, scheduler)


def park_retracted(
    scheduler: Any, engine: DenoisingEngine, running_batch: ScheduleBatch
) -> None:
    """Take the canvases of retracted requests out of the engine.

    SGLang has freed their slots and moved the requests back to its queue. Each keeps
    its state and goes on when it is admitted again. A canvas whose request is in no
    queue was aborted meanwhile.
    """
    running = {id(req.dllm_algo_state.canvas) for req in running_batch.reqs}
    strays = [canvas for canvas in engine.canvases if id(canvas) not in running]
    if not strays:
        return
    waiting = {
        id(req.dllm_algo_state.canvas): req.dllm_algo_state
        for req in scheduler.waiting_queue
        if req.dllm_algo_state is not None
    }
    retracted = [canvas for canvas in strays if id(canvas) in waiting]
    for canvas, group in zip(retracted, engine.park(retracted), strict=True):
        waiting[id(canvas)].group = group
    engine.release([canvas for canvas in strays if id(canvas) not in waiting])


def canvas_of(req: Req, scheduler: Any, engine: DenoisingEngine) -> Canvas | None:
    """The canvas of a waiting request. It is made once and kept.

    Returns:
        None where the request ends without one: it was aborted, it asks for nothing,
        it cannot be served, or its algorithm failed.
    """
    if req.finished() or req.to_finish is not None:
        req.update_finish_state(0)
        return None
    if req.sampling_params.max_new_tokens == 0:
        # SGLang's n > 1 first asks for an empty answer, to warm a prefix cache.
        req.finished_reason = FINISH_LENGTH(length=0)
        return None
    if req.dllm_algo_state is None:
        # A third party's code may raise anything.
        with Guard(
            lambda error: _end(req, error, engine), engine.denoiser.agree
        ) as guard:
            req.dllm_algo_state = start(req, scheduler, engine)
        if guard.caught:
            return None
    assert req.dllm_algo_state is not None, "it has no canvas and no error"
    canvas: Canvas = req.dllm_algo_state.canvas
    if canvas.failure is not None:
        # It failed in the forward that was in flight when it was retracted.
        logger.error("request %s failed: %s", req.rid, canvas.failure)
        req.finished_reason = failed(canvas.failure)
        return None
    return canvas


def failed(message: str) -> FINISH_ABORT:
    """The end of a request whose algorithm failed: status 500."""
    return FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR)


def _end(req: Req, error: Exception, engine: DenoisingEngine) -> None:
    """End a request that cannot start: 400 for a wrong field, 500 for a failure."""
    req.dllm_algo_state = None
    if isinstance(error, RequestError | ConfigError):
        logger.warning("request %s is refused: %s", req.rid, error)
        engine.metrics.refused(error)
        req.finished_reason = FINISH_ABORT(
            text_of(error), HTTPStatus.BAD_REQUEST, "BadRequestError"
        )
    else:
        logger.error("request %s could not start", req.rid, exc_info=error)
        req.finished_reason = failed(message_of(error))


def start(req: Req, scheduler: Any, engine: DenoisingEngine) -> Denoising:
    """Make the canvas of a request, with nothing decoded and its first step chosen.

    Raises:
        RequestError, OptionError: a field is wrong or too large for this server.
        Exception: whatever a third party's algorithm raises.
    """
    facts = engine.facts
    params = req.sampling_params
    _check_ids("input_ids", req.origin_input_ids, facts)
    _check_fields(req)
    parts = given_canvas(params.custom_params)
    _check_length(req, parts, scheduler)
    request = request_options(params.custom_params)
    decode = scheduler.dllm_config.decode
    stop_ids = _stop_ids(scheduler.tokenizer).union(
        params.stop_token_ids or (), req.eos_token_ids or ()
    )
    scoring = given_scoring(params.custom_params, facts.family)
    if scoring is not None:
        decoding, decoded_len = scoring.decoding, len(scoring.continuation)
    elif parts is None:
        decoding = decode.resolve(request).resolved(params.max_new_tokens, facts)
    else:
        _check_ids("canvas", [id for id in parts.template if id != MASK] or [0], facts)
        decoding = decode.resolve_given(request)
        decoded_len = parts.decoded_len(decoding.block_size)
        decoding = decoding.resolved(decoded_len, facts)
    delimiters = getattr(decoding.options, "delimiter_ids", None)
    _check_ids("delimiter_ids", delimiters or [0], facts)
    sampling = sampling_of(req, facts.vocab_size)
    if scoring is not None:
        _check_ids("score.continuation", scoring.continuation, facts)
        canvas = scoring.new_canvas(req.origin_input_ids, facts, sampling.seed)
    else:
        canvas = decoding.new_canvas(
            req.origin_input_ids,
            params.max_new_tokens,
            facts,
            template=None if parts is None else parts.template,
            num_shown=None if parts is None else parts.num_shown,
            sampling=sampling,
            ignore_eos=params.ignore_eos,
            ends_at_eos=not params.ignore_eos,
            edits=token_edits_of(params, stop_ids.union(facts.eos_ids), facts),
        )
    give_form(req, canvas)
    _check_windows(canvas, scheduler)
    req.full_untruncated_fill_ids = fill_ids(canvas)
    watching = watching_of(params.custom_params)
    if watching.is_on:
        canvas.watch()
    begin_logprobs(req, canvas, facts.vocab_size)
    # The text of a gap behind another one comes later than the gap.
    gaps = parts.gaps if parts is not None and req.stream else []
    report = RequestReport(
        canvas, decoding, watching, gaps if gaps[1:] else [], scoring
    )
    req.customized_info = report.as_customized_info()
    if parts is None:
        decoded_len = canvas.answer_len
    group = engine.prepare(canvas, decoding.finalized(decoded_len, facts))
    interval = params.stream_interval or scheduler.stream_interval
    # SGLang sends all that it is given; ``emission.is_due`` decides.
    params.stream_interval = 1
    streamed = report if req.stream else None
    return Denoising(canvas, decoding, group, stop_ids, interval, streamed)


def _check_ids(field: str, ids: Sequence[int], facts: ModelFacts) -> None:
    """Refuse ids that the embedding or the logits do not have."""
    if not ids or min(ids) < 0 or max(ids) >= facts.vocab_size:
        raise RequestError(
            f"{field}: expected 1 or more token ids, 0 to {facts.vocab_size - 1}"
        )


def _check_fields(req: Req) -> None:
    """Refuse a request that the scheduler could not survive or would serve wrongly."""
    params = req.sampling_params
    custom = params.custom_params or {}
    if not isinstance(custom, dict) or not isinstance(
        custom.get(CUSTOM_PARAMS_KEY) or {}, dict
    ):
        raise RequestError(f"custom_params={custom!r} is not allowed; expected objects")
    if type(params.max_new_tokens) is not int or params.max_new_tokens < 1:
        raise RequestError(
            f"max_new_tokens={params.max_new_tokens!r} is not allowed; "
            "expected an integer, 1 or more"
        )


def _check_length(req: Req, parts: CanvasParts | None, scheduler: Any) -> None:
    """Refuse a canvas that the KV pool could never hold."""
    answer_len = req.sampling_params.max_new_tokens
    if parts is not None:
        if not 0 < parts.num_shown <= len(parts.template) or not parts.gaps:
            raise RequestError("canvas: expected positions to show, and a mask")
        answer_len = len(parts.template)
    canvas_len = len(req.origin_input_ids) + answer_len
    page_size = scheduler.page_size
    pool = scheduler.max_total_num_tokens // page_size * page_size
    most = min(scheduler.max_req_len, pool)
    if canvas_len > most:
        raise RequestError(
            f"max_new_tokens={answer_len} does not fit: prompt and answer "
            f"have {canvas_len} tokens; expected at most {most}"
        )


def _check_windows(canvas: Canvas, scheduler: Any) -> None:
    """Refuse guidance where a forward may have one window only.

    Both windows share the KV slots of one canvas, so the pool does not limit them.
    """
    if canvas.num_windows > scheduler.max_running_requests:
        raise RequestError("guidance needs --max-running-requests of 2 or more")


@lru_cache(maxsize=1)
def _stop_ids(tokenizer: Any) -> frozenset[int]:
    """The stop tokens of a tokenizer. Cached: the tokenizer needs long for it."""
    if tokenizer is None:
        return frozenset()
    more = tokenizer.additional_stop_token_ids or ()
    return frozenset({tokenizer.eos_token_id, *more} - {None})
