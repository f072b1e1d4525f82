"""Fair admission: who may pass whom, and the bounds that docs/overload.md states."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Req

from helpers.fake_scheduler import FakeScheduler, end_of
from sglang_dllm.runtime.load import canvas_tokens, most_left

ONE_A_FORWARD: dict[str, Any] = {"algorithm": "EntropyThreshold", "threshold": 0}
"""Each forward commits one token: the slowest decoding of a canvas."""
PROMPT = 2


def ask(scheduler: FakeScheduler, rid: str, length: int, **more: Any) -> Req:
    return scheduler.queue(rid, length, dllm={**ONE_A_FORWARD, **more})


def test_the_queue_waits_for_slots_in_its_order() -> None:
    """A request of the same length as the one that waits passes nobody."""
    scheduler = FakeScheduler(slots=25, context_len=50)
    reqs = [ask(scheduler, f"{i}", length=8) for i in range(2)]
    long = ask(scheduler, "long", length=18)
    short = ask(scheduler, "short", length=9)
    scheduler.loop()
    assert scheduler.running == ["0", "1"], "two canvases of 10 tokens fit"
    while "long" not in scheduler.running:
        assert "short" not in scheduler.running
        scheduler.loop()
    scheduler.loop_to_end()
    assert [end_of(r)[0] for r in (*reqs, long, short)] == ["length"] * 4
    assert scheduler.free_slots == (25, 4)


def test_small_ones_use_the_room_beside_a_large_one_that_waits() -> None:
    scheduler = FakeScheduler(slots=100, max_running_requests=4)
    ask(scheduler, "runs", length=60)
    large = ask(scheduler, "large", length=60)
    small = [ask(scheduler, f"small-{i}", length=10) for i in range(6)]
    scheduler.loop()
    assert scheduler.running == ["runs", "small-0", "small-1", "small-2"]
    scheduler.loop(25)
    assert all(req.finished() for req in small)
    assert not large.finished() and "large" not in scheduler.running
    scheduler.loop_to_end()
    assert scheduler.free_slots == (100, 4)


@pytest.mark.parametrize("steps_per_round", [1, 4])
def test_a_crowd_of_small_ones_does_not_hold_back_a_large_one(
    steps_per_round: int,
) -> None:
    """However many come: it waits for no more forwards than without them."""
    scheduler = FakeScheduler(100, 4, steps_per_round=steps_per_round)
    first = ask(scheduler, "runs", length=40)
    large = ask(scheduler, "large", length=90)
    scheduler.loop()
    bound = most_left(scheduler.running_batch.reqs)
    assert bound == 40 - steps_per_round
    rounds, before = 0, scheduler.toy.launches()
    while "large" not in scheduler.running:
        # A newcomer in each round, and each would fit.
        ask(scheduler, f"small-{rounds}", length=1 + rounds % 12)
        scheduler.loop()
        rounds += 1
        assert rounds < 100, "it starves"
    passed = sum(rid.startswith("small") for rid in scheduler.sent)
    assert passed > 5 and first.finished()
    # The round that admits it runs up to so many forwards with it.
    assert scheduler.toy.launches() - before <= bound + steps_per_round
    assert not large.finished()
    scheduler.loop_to_end()
    assert scheduler.free_slots == (100, 4)


@given(
    running=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    arrivals=st.lists(st.integers(1, 30), max_size=30),
    large=st.integers(60, 90),
    small=st.integers(1, 30),
)
def test_the_bounds_hold_for_any_arrivals(
    running: list[int], arrivals: list[int], large: int, small: int
) -> None:
    """A large one waits until those that run have ended, at most. One of m tokens that
    fits is held back by it for less than m forwards."""
    scheduler = FakeScheduler(100, 4)
    for i, length in enumerate(running):
        ask(scheduler, f"first-{i}", length)
    scheduler.loop()
    ask(scheduler, "large", large)
    one = ask(scheduler, "small", small)
    bound = most_left(scheduler.running_batch.reqs)
    waited = held_back = 0
    coming = iter(arrivals)
    while "large" not in scheduler.running:
        slots, rows = scheduler.free_slots
        would_fit = rows > 0 and slots >= small + PROMPT
        for length in [next(coming, None)]:
            if length is not None:
                ask(scheduler, f"later-{waited}", length)
        scheduler.loop()
        waited += 1
        seen = "small" in scheduler.running or one.finished()
        held_back += would_fit and not seen and "large" not in scheduler.running
        assert waited <= bound + 1, "the large one starves"
    assert held_back < small, "the small one starves"
    scheduler.loop_to_end()
    assert scheduler.free_slots == (100, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 50, "algorithm": "Dream"},
        {"score": {"continuation": [1, 2], "method": "chain"}},
    ],
    ids=["many steps", "a score"],
)
def test_a_request_whose_forwards_may_be_many_passes_nobody(
    options: dict[str, Any],
) -> None:
    scheduler = FakeScheduler(slots=60, max_running_requests=4)
    ask(scheduler, "runs", length=40)
    ask(scheduler, "large", length=50)
    scheduler.queue("other", 2, dllm=options)
    ask(scheduler, "small", length=2)
    scheduler.loop()
    assert scheduler.running == ["runs", "small"]


def test_the_tokens_of_a_canvas_that_waits() -> None:
    scheduler = FakeScheduler()
    plain = ask(scheduler, "plain", length=30)
    assert canvas_tokens(plain) == PROMPT + 30
    parts = [{"mask": 5}, {"ids": [1, 2]}, {"mask": 3}, {"ids": [4], "shown": False}]
    given_part = ask(scheduler, "parts", length=10, canvas=parts)
    assert canvas_tokens(given_part) == PROMPT + 11
    for wrong in (["text"], 5, [{"mask": None}]):
        bad = ask(scheduler, "bad", length=7, canvas=wrong)
        assert canvas_tokens(bad) == PROMPT + 7
    assert canvas_tokens(ask(scheduler, "none", length=None)) == PROMPT  # type: ignore[arg-type]
    scheduler.loop()
    assert canvas_tokens(plain) == len(plain.dllm_algo_state.canvas)
