"""Growth: canvases that change their length between two rounds get their slots."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_dllm.decoding.guard import Guard, message_of
from sglang_dllm.runtime.admission import Denoising, enter
from sglang_dllm.runtime.engine import DenoisingEngine
from sglang_dllm.runtime.load import round_load
from sglang_dllm.runtime.schedule_batch import (
    fill_ids,
    set_aside_slots,
    try_extend_canvas_slots,
)


def resize_canvases(
    scheduler: Any, engine: DenoisingEngine, running_batch: ScheduleBatch
) -> None:
    """Apply the changes of length that canvases wait for.

    The oldest goes first. A canvas that finds no slots, or no room in a forward, waits
    and keeps what it has; the other canvases go on and free theirs. If all of them
    wait, the youngest is set aside: it gives its slots back and waits at the head of
    the queue, with its tokens. Each canvas fits alone, so one of them always goes on.
    """
    for req in running_batch.reqs:
        if req.dllm_algo_state.canvas.resize is not None:
            _resize(req, engine)
    waiting = _enter_grown(scheduler, engine, running_batch.reqs)
    # Otherwise another one has ended, and frees its slots in this round.
    while waiting and len(waiting) == len(running_batch.reqs):
        _set_aside(running_batch.reqs[-1], scheduler, running_batch)
        waiting = _enter_grown(scheduler, engine, running_batch.reqs)


def _resize(req: Req, engine: DenoisingEngine) -> None:
    state: Denoising = req.dllm_algo_state
    canvas = state.canvas
    # A third party's code may raise anything.
    with Guard(lambda error: canvas.fail(message_of(error)), engine.denoiser.agree):
        state.resize(engine)
    req.full_untruncated_fill_ids = fill_ids(canvas)


def _enter_grown(scheduler: Any, engine: DenoisingEngine, reqs: list[Req]) -> list[Req]:
    """Let resized canvases go on while they find slots, in their order.

    Returns:
        The requests that wait.
    """
    waiting = [req for req in reqs if req.dllm_algo_state.group is not None]
    load = round_load(scheduler, engine.canvases)
    while waiting:
        req, canvas = waiting[0], waiting[0].dllm_algo_state.canvas
        fits = load.has_room(canvas, scheduler)
        if not fits or not try_extend_canvas_slots(req, canvas, scheduler):
            break
        enter(req, engine)
        load.add(canvas)
        del waiting[0]
    return waiting


def _set_aside(req: Req, scheduler: Any, running_batch: ScheduleBatch) -> None:
    """Give the slots of a request back, and let it wait for others."""
    set_aside_slots(req, req.dllm_algo_state.canvas, scheduler)
    running_batch.reqs = [other for other in running_batch.reqs if other is not req]
    scheduler.waiting_queue = [req, *scheduler.waiting_queue]
