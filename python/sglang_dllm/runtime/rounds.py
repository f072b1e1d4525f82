"""Rounds: admit, denoise every active canvas by a few steps, hand out what is final.

The active canvases are the requests of the scheduler's ``running_batch``, so that
its abort, timeout, load and metrics code sees them; waiting requests stay in its
own queue until their canvas fits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    BaseFinishReason,
    Req,
    ScheduleBatch,
)
from sglang.srt.observability.req_time_stats import set_time_batch

from sglang_dllm.config.resolve import request_options
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.graphs import window_graphs
from sglang_dllm.runtime.metrics import Metrics
from sglang_dllm.runtime.report import RequestReport
from sglang_dllm.runtime.schedule_batch import (
    CanvasScheduleBatch,
    fill_ids,
    release_canvas_slots,
    try_alloc_canvas_slots,
)

logger = logging.getLogger(__name__)


class FinishEos(BaseFinishReason):
    """The answer ended with an EOS, which is not part of the output."""

    def to_json(self) -> dict[str, Any]:
        # Without a matched token the detokenizer trims nothing off the output.
        return {"type": "stop", "matched": None}


@dataclass
class Denoising:
    """What a request carries in ``dllm_algo_state``.

    Attributes:
        enter: makes the decoder take the canvas in.
        stop_ids: tokens of which SGLang's own rules may end the request.
    """

    canvas: Canvas
    enter: Callable[[], None]
    stop_ids: frozenset[int]


def next_round(
    scheduler: Any, running_batch: ScheduleBatch
) -> CanvasScheduleBatch | None:
    """Admit what fits and build the batch of the next denoising step.

    Returns None when nothing is active.
    """
    finish_aborted(scheduler, running_batch)
    _leave_retracted(scheduler, running_batch)
    admitted = _admit(scheduler, running_batch)
    if not running_batch.reqs:
        return None
    _give_up_failed(running_batch.reqs)
    finish_aborted(scheduler, running_batch)
    if not running_batch.reqs:
        return None
    algorithm = scheduler.tp_worker.dllm_algorithm
    _settle_round(scheduler, running_batch.reqs)
    algorithm.batch = batch = CanvasScheduleBatch.init_new(
        list(running_batch.reqs),
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare(_decoder(scheduler).pack())
    if admitted:
        set_time_batch(admitted, "set_forward_entry_time")
    return batch


def finish_round(scheduler: Any, batch: CanvasScheduleBatch, result: Any) -> None:
    """Hand out the tokens that became final and free what finished."""
    running = scheduler.running_batch
    _give_up_failed(batch.reqs)
    progressed = [req for req in batch.reqs if _emit(req, scheduler)]
    _hand_out(scheduler, running, progressed, batch.return_logprob)
    reporter = scheduler.metrics_reporter
    reporter.forward_ct_decode = (reporter.forward_ct_decode + 1) % (1 << 30)
    # A round that ended the last request reports the requests it ran.
    reporter.report_decode_stats(
        result.can_run_cuda_graph, running_batch=running if running.reqs else batch
    )
    # SGLang keeps this batch as last_batch. A retracting pause and the memory check
    # walk both it and running_batch, and would free and count our requests twice.
    batch.reqs = []


def finish_aborted(scheduler: Any, running_batch: ScheduleBatch) -> None:
    """End requests that an abort or a timeout marked, before another forward."""
    aborted = [req for req in running_batch.reqs if req.to_finish is not None]
    if not aborted:
        return
    for req in aborted:
        req.update_finish_state(0)
    _hand_out(scheduler, running_batch, aborted, False)


def _give_up_failed(reqs: Iterable[Req]) -> None:
    """Mark the requests whose algorithm failed, which is answered with status 500."""
    for req in reqs:
        failure = req.dllm_algo_state.canvas.failure
        if failure is not None:
            req.to_finish = FINISH_ABORT(failure, HTTPStatus.INTERNAL_SERVER_ERROR)


def _hand_out(
    scheduler: Any, running_batch: ScheduleBatch, reqs: list[Req], logprob: bool
) -> None:
    """Send what requests have new, then let go of those that have ended. In this order:
    a forward that still runs has to be waited for before a canvas leaves."""
    for req in reqs:
        if req.finished():
            req.time_stats.set_completion_time()
    scheduler.output_streamer.stream_output(reqs, logprob)
    _release_finished(scheduler, running_batch)


def _release_finished(scheduler: Any, running_batch: ScheduleBatch) -> None:
    finished = [req for req in running_batch.reqs if req.finished()]
    if not finished:
        return
    scheduler.tp_worker.dllm_algorithm.land()
    canvases = [req.dllm_algo_state.canvas for req in finished]
    _decoder(scheduler).remove(canvases)
    for canvas in canvases:
        scheduler.tp_worker.dllm_algorithm.metrics.ended(canvas)
    for req in finished:
        release_canvas_slots(req, scheduler)
    running_batch.reqs = [r for r in running_batch.reqs if not r.finished()]
    running_batch.batch_is_full = False


def _leave_retracted(scheduler: Any, running_batch: ScheduleBatch) -> None:
    """Take canvases whose requests are not running any more out of the decoder."""
    decoder = _decoder(scheduler)
    running = {id(req.dllm_algo_state.canvas) for req in running_batch.reqs}
    if all(id(canvas) in running for canvas in decoder.canvases):
        return
    # What it decides of them still counts; those that fail have left by then.
    scheduler.tp_worker.dllm_algorithm.land()
    strays = [canvas for canvas in decoder.canvases if id(canvas) not in running]
    for req in scheduler.waiting_queue:
        waiting = req.dllm_algo_state
        if waiting is not None and waiting.canvas in strays:
            group = decoder.park(waiting.canvas)
            waiting.enter = partial(scheduler.tp_worker.dllm_algorithm.admit, group)
    decoder.remove(strays)


def _admit(scheduler: Any, running_batch: ScheduleBatch) -> list[Req]:
    """Move waiting requests to the running batch, in the scheduler's order.

    A canvas is admitted when a request slot and all its KV slots are free, and the
    round stays within --max-prefill-tokens (one canvas is always let in) and, in rows,
    within --max-running-requests. The first that does not fit waits and holds back the
    rest, so that none starves.
    """
    if not scheduler.waiting_queue:
        return []
    scheduler.policy.calc_priority(scheduler.waiting_queue)
    active: list[Req] = running_batch.reqs
    admitted: list[Req] = []
    rejected: list[Req] = []
    taken = 0
    # Rows with guidance share slots, so that slots alone do not bound a round.
    max_round_tokens = min(scheduler.max_prefill_tokens, scheduler.max_total_num_tokens)
    canvases = [req.dllm_algo_state.canvas for req in active]
    round_rows = sum(canvas.num_rows for canvas in canvases)
    round_tokens = sum(canvas.num_rows * len(canvas) for canvas in canvases)
    for req in scheduler.waiting_queue:
        canvas = _canvas_of(req, scheduler)
        if canvas is None:
            rejected.append(req)
            taken += 1
            continue
        num_free = scheduler.get_num_allocatable_reqs(round_rows)
        if round_rows and num_free < canvas.num_rows:
            break
        row_tokens = canvas.num_rows * len(canvas)
        if round_rows and round_tokens + row_tokens > max_round_tokens:
            break
        if not try_alloc_canvas_slots(req, canvas, scheduler):
            break
        taken += 1
        if not _enter(req, scheduler):
            rejected.append(req)
            continue
        req.set_extend_range(0, len(canvas))
        admitted.append(req)
        round_rows += canvas.num_rows
        round_tokens += row_tokens
    scheduler.waiting_queue = scheduler.waiting_queue[taken:]
    running_batch.reqs = active + admitted
    if rejected:
        scheduler.output_streamer.stream_output(rejected, False)
    return admitted


def _canvas_of(req: Req, scheduler: Any) -> Canvas | None:
    """The request's canvas, made when admission first looks at it and kept.

    A retracted request goes on with the canvas it has. None where the request ends
    without one: aborted or asking for nothing.
    """
    if req.finished() or req.to_finish is not None:
        req.update_finish_state(0)
        return None
    if req.sampling_params.max_new_tokens == 0:
        # SGLang's n > 1 first asks for an empty answer to warm a prefix cache.
        req.finished_reason = FINISH_LENGTH(length=0)
        return None
    if req.dllm_algo_state is None:
        req.dllm_algo_state = _start(req, scheduler)
    return req.dllm_algo_state.canvas


def _enter(req: Req, scheduler: Any) -> bool:
    """Give the canvas to the decoder. Where its algorithm fails, the request ends."""
    try:
        req.dllm_algo_state.enter()
        return True
    except Exception as error:  # may be a third party's code
        logger.error("request %s could not start", req.rid, exc_info=error)
        req.finished_reason = FINISH_ABORT(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
        release_canvas_slots(req, scheduler)
        return False


def _start(req: Req, scheduler: Any) -> Denoising:
    """A canvas with nothing decoded, and what the request's responses report of it."""
    config = scheduler.dllm_config
    params = req.sampling_params
    seed = params.sampling_seed
    request = request_options(params.custom_params)
    decoding = config.decode.resolve(request, params.max_new_tokens)
    algorithm, options = decoding.algorithm, decoding.options
    options = algorithm.complete(options, _facts(scheduler))
    canvas = Canvas.from_prompt(
        req.origin_input_ids,
        params.max_new_tokens,
        mask_id=config.facts.mask_id,
        eos_ids=config.facts.eos_ids,
        ignore_eos=params.ignore_eos,
        ends_at_eos=not params.ignore_eos,
        has_cache=options.cache != "none",
        num_rows=2 if algorithm.is_guided(options) else 1,
        sampling=SamplingOptions(
            # SamplingParams.normalize turns temperature 0 into top_k 1.
            temperature=0.0 if params.top_k == 1 else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k if params.top_k < config.facts.vocab_size else 0,
            seed=seed if seed is not None else _seed_of(req.rid),
        ),
    )
    req.full_untruncated_fill_ids = fill_ids(canvas)
    report = RequestReport(canvas, replace(decoding, options=options))
    req.customized_info = report.as_customized_info()
    decoder = _decoder(scheduler)
    stop_ids = _stop_ids(scheduler.tokenizer).union(
        params.stop_token_ids or (), req.eos_token_ids or ()
    )
    admit = scheduler.tp_worker.dllm_algorithm.admit

    def enter() -> None:
        admit(decoder.prepare(canvas, algorithm, options))

    return Denoising(canvas, enter, stop_ids)


@lru_cache(maxsize=1)
def _stop_ids(tokenizer: Any) -> frozenset[int]:
    """Those of the tokenizer, which takes as long to name one as a token may take."""
    if tokenizer is None:
        return frozenset()
    more = tokenizer.additional_stop_token_ids or ()
    return frozenset({tokenizer.eos_token_id, *more} - {None})


def _decoder(scheduler: Any) -> Denoiser:
    """The scheduler's decoder, made once its tokenizer and its model are there."""
    algorithm = scheduler.tp_worker.dllm_algorithm
    if algorithm.decoder is None:
        algorithm.decoder = Denoiser(_facts(scheduler), scheduler.device)
        algorithm.metrics = Metrics(scheduler.metrics_collector)
        algorithm.graphs = window_graphs(
            scheduler.tp_worker.model_runner,
            scheduler.server_args,
            _facts(scheduler),
        )
    decoder: Denoiser = algorithm.decoder
    return decoder


def _settle_round(scheduler: Any, reqs: Iterable[Req]) -> None:
    """How far a round goes. One step where a request brings stops that only the host
    sees, so that it runs no more forwards than it needs; those of the tokenizer that
    the model's config does not name may cost it the rest of a round, and the forward
    ahead of it."""
    params = [req.sampling_params for req in reqs]
    stops = any(p.stop_strs or p.stop_regex_strs or p.stop_token_ids for p in params)
    decode = scheduler.dllm_config.decode
    algorithm = scheduler.tp_worker.dllm_algorithm
    algorithm.num_steps = 1 if stops else decode.steps_per_round
    prelaunch = decode.prelaunch
    if prelaunch is None:
        # A launch on a CPU is the forward: it would only keep tokens from the client.
        prelaunch = scheduler.device != "cpu"
    algorithm.runs_ahead = prelaunch and not stops


def _facts(scheduler: Any) -> ModelFacts:
    """The model's facts with those of the scheduler's tokenizer, made once."""
    config = scheduler.dllm_config
    if config.complete_facts is None:
        config.complete_facts = config.facts.with_tokenizer(scheduler.tokenizer)
    return config.complete_facts


def _seed_of(rid: str) -> int:
    """A seed for a request that names none: the same on every tensor-parallel rank."""
    digest = hashlib.blake2b(rid.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _emit(req: Req, scheduler: Any) -> bool:
    """Append newly final tokens to the request's output, up to its end.

    Returns whether there is something to send.
    """
    canvas: Canvas = req.dllm_algo_state.canvas
    stop_ids, params = req.dllm_algo_state.stop_ids, req.sampling_params
    has_text_stops = bool(params.stop_strs or params.stop_regex_strs)
    before = len(req.output_ids)
    for token in canvas.take_committed_prefix().tolist():
        if token in canvas.eos_ids and not params.ignore_eos:
            req.finished_reason = FinishEos()
            break
        req.output_ids.append(token)
        is_last = len(req.output_ids) >= params.max_new_tokens
        if is_last or has_text_stops or token in stop_ids:
            _check_end(req, token)
            if req.finished():
                break
    num_new = len(req.output_ids) - before
    scheduler.metrics_reporter.num_generated_tokens += num_new
    return num_new > 0 or req.finished()


def _check_end(req: Req, token: int) -> None:
    """SGLang's own stop rules, in canvas order: at each token, stops before length."""
    if req._check_str_based_finish(1) or req._check_token_based_finish([token]):
        return
    if len(req.output_ids) >= req.sampling_params.max_new_tokens:
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
