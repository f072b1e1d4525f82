"""Canvases that grow: their tokens, their slots, and the pool that is too small."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from helpers.fake_scheduler import FakeScheduler, end_of
from sglang_dllm.decoding.length_plan import Resize

BLOCK = {"block_size": 4, "steps": 2}
GROWS = {**BLOCK, "length": "append"}
PROMPTS = [(1, 2), (3,), (4, 5, 1), (2, 2)]


def decoded(scheduler: FakeScheduler, dllm: dict[str, Any], *lengths: int) -> list[Any]:
    """The tokens and the forwards of requests that run together."""
    reqs = [
        scheduler.queue(str(index), length, PROMPTS[index % 4], dllm=dllm)
        for index, length in enumerate(lengths)
    ]
    forwards: dict[int, int] = {}
    for _ in range(400):
        for index, req in enumerate(reqs):
            if req.dllm_algo_state is not None:
                forwards[index] = req.dllm_algo_state.canvas.num_forwards
        if not scheduler.running_batch.reqs and not scheduler.waiting_queue:
            break
        scheduler.loop()
    assert [end_of(req)[0] for req in reqs] == ["length"] * len(reqs)
    return [list(req.output_ids) for req in reqs]


def unit_by_unit(index: int, length: int) -> list[int]:
    """The same as fixed canvases, each with all before as its prompt."""
    tokens: list[int] = []
    while len(tokens) < length:
        scheduler = FakeScheduler()
        unit = min(4, length - len(tokens))
        prompt = (*PROMPTS[index % 4], *tokens)
        req = scheduler.queue("one", unit, prompt, dllm=BLOCK)
        scheduler.loop_to_end()
        tokens += req.output_ids
    return tokens


@pytest.mark.parametrize("steps_per_round", [1, 4])
@pytest.mark.parametrize("prelaunch", [False, True])
def test_an_answer_grows_block_by_block(steps_per_round: int, prelaunch: bool) -> None:
    lengths = (14, 4, 9, 3)
    scheduler = FakeScheduler(steps_per_round=steps_per_round, prelaunch=prelaunch)
    before = scheduler.free_slots
    found = decoded(scheduler, GROWS, *lengths)
    assert found == [unit_by_unit(i, length) for i, length in enumerate(lengths)]
    assert scheduler.free_slots == before


def test_slots_are_taken_as_the_canvas_grows() -> None:
    scheduler = FakeScheduler(slots=60, max_running_requests=8)
    # Eight caps of 40 tokens are 340 slots; eight first blocks are 48.
    for index in range(8):
        scheduler.queue(str(index), 40, (1, 2), dllm=GROWS)
    scheduler.loop()
    assert len(scheduler.running) == 8
    assert scheduler.free_slots[0] == 60 - 8 * 6


@pytest.mark.parametrize("prelaunch", [False, True])
@pytest.mark.parametrize("slots", [18, 24, 30])
def test_a_small_pool_never_locks(slots: int, prelaunch: bool) -> None:
    lengths = (12, 12, 10, 11)
    scheduler = FakeScheduler(slots=slots, prelaunch=prelaunch)
    before = scheduler.free_slots
    found = decoded(scheduler, GROWS, *lengths)
    assert found == [unit_by_unit(i, length) for i, length in enumerate(lengths)]
    assert scheduler.free_slots == before


def test_the_youngest_is_set_aside_and_keeps_its_tokens() -> None:
    scheduler = FakeScheduler(slots=16)
    old, young = (scheduler.queue(rid, 12, (1, 2), dllm=GROWS) for rid in "ab")
    scheduler.loop()
    assert scheduler.running == ["a", "b"]
    while not scheduler.waiting_queue:
        scheduler.loop()
    assert scheduler.running == ["a"] and scheduler.waiting_queue == [young]
    assert len(young.output_ids) >= 4
    scheduler.loop_to_end()
    assert list(old.output_ids) == list(young.output_ids) == unit_by_unit(0, 12)


def test_a_canvas_that_has_ended_is_not_set_aside() -> None:
    scheduler = FakeScheduler(slots=12)
    old, young = (scheduler.queue(rid, 9, (1, 2), dllm=GROWS) for rid in "ab")
    scheduler.loop(2)
    canvas = young.dllm_algo_state.canvas
    assert canvas.resize is not None
    # A rule that shrinks may leave nothing.
    canvas.resize = Resize(at=0, remove=4)
    scheduler.loop_to_end()
    assert end_of(young)[0] == "stop"
    assert list(old.output_ids) == unit_by_unit(0, 9)


def test_growth_waits_for_a_forward_with_room() -> None:
    scheduler = FakeScheduler(max_prefill_tokens=20)
    before = scheduler.free_slots
    lengths = (12, 12, 12)
    found = decoded(scheduler, GROWS, *lengths)
    assert found == [unit_by_unit(i, length) for i, length in enumerate(lengths)]
    assert scheduler.free_slots == before


def test_max_forwards_ends_the_growth() -> None:
    scheduler = FakeScheduler()
    req = scheduler.queue("a", 40, dllm={**GROWS, "max_forwards": 3})
    scheduler.loop_to_end()
    assert end_of(req)[0] == "length"
    assert len(req.output_ids) == 8


@pytest.mark.parametrize("loops", [1, 3, 5, 7])
def test_requests_that_leave_while_they_wait_free_their_slots(loops: int) -> None:
    scheduler = FakeScheduler(slots=20)
    before = scheduler.free_slots
    reqs = [scheduler.queue(rid, 12, (1, 2), dllm=GROWS) for rid in "abc"]
    scheduler.loop(loops)
    scheduler.retract_all()
    scheduler.loop(2)
    for req in (reqs[1], reqs[2]):
        if req.finished_reason is None:
            req.to_finish = FINISH_ABORT("gone")
    scheduler.loop_to_end()
    assert list(reqs[0].output_ids) == unit_by_unit(0, 12)
    assert scheduler.free_slots == before
