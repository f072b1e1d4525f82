"""The two halves of a scheduler's round, before and behind the engine's part.

The active requests are those of the scheduler's ``running_batch``, so that its abort,
timeout, load and metrics code sees them. Waiting requests stay in its own queue until
their canvas fits.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.observability.req_time_stats import set_time_batch

from sglang_dllm.runtime.admission import admit, failed, leave, park_retracted
from sglang_dllm.runtime.emission import emit, is_due
from sglang_dllm.runtime.engine import DenoisingEngine
from sglang_dllm.runtime.forms import take_compiled
from sglang_dllm.runtime.growth import resize_canvases
from sglang_dllm.runtime.logprobs import send
from sglang_dllm.runtime.schedule_batch import CanvasScheduleBatch
from sglang_dllm.upstream.compat import is_update_open, report_round

logger = logging.getLogger(__name__)


def engine_of(scheduler: Any) -> DenoisingEngine:
    """The engine of a scheduler."""
    engine: DenoisingEngine = scheduler.tp_worker.dllm_algorithm.engine_of(scheduler)
    return engine


def next_round(
    scheduler: Any, running_batch: ScheduleBatch
) -> CanvasScheduleBatch | None:
    """Let ended requests go, admit waiting ones, and make the batch of a round.

    Returns:
        None when no request is active.
    """
    engine = engine_of(scheduler)
    end_aborted(scheduler, running_batch)
    park_retracted(scheduler, engine, running_batch)
    resize_canvases(scheduler, engine, running_batch)
    take_compiled(scheduler)
    admitted = admit(scheduler, engine, running_batch)
    if admitted:
        set_time_batch(admitted, "set_forward_entry_time")
    if not running_batch.reqs:
        engine.metrics.active((), len(scheduler.waiting_queue))
        return None
    # Updates that come in many calls leave the graphs dropped.
    after_weights_change(scheduler)
    return CanvasScheduleBatch.of_round(scheduler, running_batch.reqs)


def finish_round(scheduler: Any, batch: CanvasScheduleBatch, result: Any) -> None:
    """Hand out the tokens that became final, and free what ended."""
    running, reporter = scheduler.running_batch, scheduler.metrics_reporter
    due, num_tokens = [], 0
    for req in batch.reqs:
        num_new = emit(req)
        failure = req.dllm_algo_state.canvas.failure
        if failure is not None and not req.finished():
            logger.error("request %s failed: %s", req.rid, failure)
            req.finished_reason = failed(failure)
        num_tokens += num_new
        if is_due(req):
            due.append(req)
    _hand_out(scheduler, running, due)
    reporter.num_generated_tokens += num_tokens
    reporter.forward_ct_decode = (reporter.forward_ct_decode + 1) % (1 << 30)
    # If no request is left, report this round's batch: the figures would be 0.
    report_round(
        reporter,
        result.can_run_cuda_graph,
        running if running.reqs else batch,
        num_tokens,
    )
    engine = engine_of(scheduler)
    engine.metrics.active(engine.canvases, len(scheduler.waiting_queue))
    scheduler.tp_worker.dllm_algorithm.round_log.add(
        reporter.forward_ct_decode,
        num_tokens,
        engine.num_canvas_forwards,
        len(running.reqs),
        len(scheduler.waiting_queue),
    )
    # SGLang keeps this batch as last_batch. A retracting pause and the memory check
    # walk both it and running_batch, and would free and count our requests twice.
    batch.reqs = []


def end_aborted(scheduler: Any, running_batch: ScheduleBatch) -> None:
    """End the requests that an abort or a timeout marked, before another forward."""
    marked = [req for req in running_batch.reqs if req.to_finish is not None]
    for req in marked:
        req.update_finish_state(0)
    _hand_out(scheduler, running_batch, marked)


def before_pause(scheduler: Any) -> None:
    """Commit the forward in flight, so that a pause begins with none.

    Weights may be updated during a pause. The hidden states of the old model must not
    meet the head of the new one.
    """
    engine_of(scheduler).finish_in_flight()


def before_weights_change(scheduler: Any) -> None:
    """Commit the forward in flight, and drop the CUDA graphs.

    A graph reads its tensors where they were at the capture. An update of the weights
    may replace them, and a release of memory gives them away.
    """
    engine = engine_of(scheduler)
    engine.finish_in_flight()
    engine.model.weights_changed()


def after_weights_change(scheduler: Any) -> None:
    """Capture the graphs that a change dropped, unless the change goes on.

    A change often comes in many calls. So this runs at the end of a call that is a
    change of its own, or else before the next round.
    """
    updater = scheduler.weight_updater
    if not is_update_open(updater) and not updater.offload_tags:
        engine_of(scheduler).model.recapture()


def _hand_out(scheduler: Any, running_batch: ScheduleBatch, reqs: list[Req]) -> None:
    """Send what requests have new, then let go of those that ended.

    Tokens are sent first, because a canvas leaves only after the forward in flight.
    """
    if not reqs:
        return
    ended = [req for req in reqs if req.finished()]
    for req in ended:
        req.time_stats.set_completion_time()
    send(scheduler, reqs)
    if ended:
        leave(ended, scheduler, engine_of(scheduler))
        running_batch.reqs = [r for r in running_batch.reqs if not r.finished()]
        running_batch.batch_is_full = False
