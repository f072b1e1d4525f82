"""Emission: stops cut the output where they match, and cost the others nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.toy_engine import FACTS
from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.config.watching import Watching
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.runtime.admission import Denoising, start
from sglang_dllm.runtime.emission import emit, is_due
from sglang_dllm.runtime.report import (
    CHANNEL,
    RequestReport,
    final_gaps,
    into_meta_info,
)

DECODING = DecodeConfig(FACTS.family, "LLaDA", {}).resolve({})
prelaunched = pytest.mark.parametrize("prelaunch", [False, True])


class Letters:
    """A tokenizer: token 0 is ``a``."""

    eos_token_id = 5
    additional_stop_token_ids = None
    is_fast = True

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + token) for token in ids)


def committed(req: Any, *tokens: int) -> Canvas:
    """The canvas of a request, with these tokens committed."""
    canvas = Canvas.from_prompt([1], 9, mask_id=3, eos_ids=(5,))
    for position, token in enumerate(tokens):
        if token >= 0:
            canvas.ids[1 + position] = token
            canvas.masked[1 + position] = False
    req.dllm_algo_state = Denoising(canvas, DECODING, None, frozenset({5, 8}))
    return canvas


def given(req: Any, *template: int, num_shown: int | None = None) -> Canvas:
    """The canvas of a request that gives a part of it; each gap is filled with 0."""
    canvas = Canvas.from_template(
        [1], template, mask_id=3, eos_ids=(5,), num_shown=num_shown
    )
    canvas.ids[canvas.masked] = 0
    canvas.masked[:] = False
    req.dllm_algo_state = Denoising(canvas, DECODING, None, frozenset({5, 8}))
    return canvas


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler(tokenizer=Letters())


def test_only_the_contiguous_prefix_goes_out(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=9)
    canvas = committed(req, 0, 1, -1, 2)
    assert emit(req) == 2 and list(req.output_ids) == [0, 1]
    assert emit(req) == 0
    canvas.ids[3], canvas.masked[3] = 4, False
    assert emit(req) == 2 and list(req.output_ids) == [0, 1, 4, 2]
    assert not req.finished()


def test_a_draft_is_due_without_a_token(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=9)
    canvas = committed(req, -1, 2)
    canvas.watch()
    history = canvas.history
    assert history is not None
    history.note(1, np.array([-1]), np.array([4]), None)
    assert not is_due(req), "nobody asked for drafts"
    watching = Watching(stream="draft")
    req.dllm_algo_state.report = RequestReport(canvas, DECODING, watching)
    assert is_due(req)
    history.take_news()
    assert not is_due(req)


def test_a_gap_is_due_when_it_is_final_though_its_text_is_not(
    scheduler: FakeScheduler,
) -> None:
    req = scheduler.queue("one", length=9)
    canvas = committed(req, -1, 2, -1, 4, 5)
    report = RequestReport(canvas, DECODING, None, [(0, 1), (3, 5), (5, 9)])
    assert not is_due(req), "the answer is not streamed"
    req.dllm_algo_state.report = report
    assert is_due(req)
    meta_info = {CHANNEL: report.as_customized_info()[CHANNEL][0:0]}
    assert final_gaps(meta_info) == [[1, [4, 5]]]
    assert not is_due(req), "it was sent"
    into_meta_info(meta_info)
    assert "final_gaps" not in meta_info and meta_info["num_forwards"] == 0


def test_an_eos_is_no_output(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=9, ignore_eos=False)
    committed(req, 0, 5, 1, 2)
    assert emit(req) == 1 and list(req.output_ids) == [0]
    assert end_of(req)[0] == "stop"


def test_an_eos_that_is_ignored_is_output(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=4)
    committed(req, 0, 5, 1, 2)
    assert emit(req) == 4
    assert end_of(req)[0] == "length"


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        ({"stop": "bc"}, [0, 1, 2]),
        ({"stop": ["zz", "c"]}, [0, 1, 2]),
        ({"stop_regex": "c.?e"}, [0, 1, 2, 4]),
        ({"stop_token_ids": [8], "ignore_eos": False}, [0, 1, 2, 4, 8]),
    ],
)
def test_the_first_match_ends_the_output(
    scheduler: FakeScheduler, stops: dict[str, Any], kept: list[int]
) -> None:
    """A round may have committed more behind it, which nobody sees."""
    req = scheduler.queue("one", length=9, **stops)
    committed(req, 0, 1, 2, 4, 8, 2, 7, 0, 1)
    assert emit(req) == len(kept)
    assert list(req.output_ids) == kept
    assert req.finished() and end_of(req)[0] == "stop"


def test_a_stop_comes_before_the_length(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=3, stop="c")
    committed(req, 0, 1, 2)
    assert emit(req) == 3
    assert end_of(req)[0] == "stop"


def rounds_of(prelaunch: bool, **stops: Any) -> dict[str, Any]:
    """Two requests, the second with or without stops, until the first has ended."""
    scheduler = FakeScheduler(
        steps_per_round=4, prelaunch=prelaunch, tokenizer=Letters()
    )
    plain = scheduler.queue("plain", length=16, dllm={"steps": 16})
    other = scheduler.queue("other", (16), (4,), dllm={"steps": 16}, **stops)
    rounds = 0
    while not plain.finished():
        rounds += 1
        scheduler.loop()
        assert rounds < 50
        if rounds == 1:
            in_flight = scheduler.engine.in_flight
    scheduler.loop_to_end()
    assert scheduler.free_slots == (100, 4)
    return {
        "rounds": rounds,
        "prelaunched": in_flight is not None,
        "tokens": list(plain.output_ids),
        "other": list(other.output_ids),
        "launches": scheduler.toy.launches(),
    }


@prelaunched
@pytest.mark.parametrize(
    "stops",
    [
        {"stop": "never in it"},
        {"stop_regex": "never in it"},
        {"stop_token_ids": [10_000]},
    ],
)
def test_stops_of_one_leave_the_rounds_of_the_others(
    stops: dict[str, Any], prelaunch: bool
) -> None:
    """Nearly every evaluation sends stops. They once made rounds of one step, without
    a prelaunch, for every request."""
    assert rounds_of(prelaunch, **stops) == rounds_of(prelaunch)
    assert rounds_of(prelaunch)["rounds"] == 4
    assert rounds_of(prelaunch)["prelaunched"] == prelaunch


@prelaunched
def test_a_stop_costs_at_most_the_rest_of_its_round(prelaunch: bool) -> None:
    plain = rounds_of(prelaunch)
    # The token that comes first in the answer of the second request.
    letter = chr(97 + plain["other"][0])
    found = rounds_of(prelaunch, stop=letter)
    assert found["other"] == plain["other"][:1]
    assert found["tokens"] == plain["tokens"]


@prelaunched
def test_a_request_that_waits_for_its_commit_sends_nothing(prelaunch: bool) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    scheduler.queue("one", length=8)
    scheduler.loop()
    scheduler.engine.canvases[0].masked[:] = True
    scheduler.engine.run_round = lambda: None  # type: ignore[method-assign]
    before = dict(scheduler.sent)
    scheduler.loop()
    assert scheduler.sent == before
    assert scheduler.metrics_reporter.num_generated_tokens == sum(
        counts[-1] for counts in before.values()
    )


def test_numbers_of_numpy_do_not_reach_the_output(scheduler: FakeScheduler) -> None:
    """SGLang's process borders pack plain integers only."""
    req = scheduler.queue("one", length=9)
    committed(req, 0, 1)
    emit(req)
    assert not any(isinstance(token, np.integer) for token in req.output_ids)
    assert SimpleNamespace(ids=list(req.output_ids)).ids == [0, 1]


@pytest.mark.parametrize(
    ("interval", "chunks"), [(1, [1, 2, 3, 8]), (3, [1, 8]), (7, [1, 8]), (99, [1, 9])]
)
def test_a_stream_is_sent_all_that_is_there_at_its_interval(
    scheduler: FakeScheduler, interval: int, chunks: list[int]
) -> None:
    req = scheduler.queue("one", length=9)
    canvas = committed(req)
    req.dllm_algo_state.stream_interval = interval
    sent = []
    for num in (0, 1, 2, 3, 3, 8, 9):
        canvas.ids[1 : 1 + num] = 0
        canvas.masked[1 : 1 + num] = False
        emit(req)
        if is_due(req):
            sent.append(len(req.output_ids))
            req.send_token_offset = len(req.output_ids)
    assert sent == (chunks if chunks[-1] == 9 else [*chunks, 9])


def test_a_request_may_have_its_own_interval(scheduler: FakeScheduler) -> None:
    scheduler.stream_interval = 5
    own = scheduler.queue("own", stream_interval=3)
    servers = scheduler.queue("servers")
    for req in (own, servers):
        state = start(req, scheduler, scheduler.engine)
        assert state.stream_interval == (3 if req is own else 5)
        assert req.sampling_params.stream_interval == 1


def test_an_end_in_front_of_given_text_ends_nothing(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=5, ignore_eos=False)
    canvas = given(req, -1, -1, -1, 7, -1)
    canvas.ids[1:4] = [0, 5, 8]
    assert emit(req) == 5 and list(req.output_ids) == [0, 5, 8, 7, 0]
    assert end_of(req)[0] == "length"


def test_an_eos_behind_given_text_ends_the_answer(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=6, ignore_eos=False)
    canvas = given(req, -1, 7, -1, -1, -1, -1)
    canvas.ids[1], canvas.ids[4] = 5, 5
    assert emit(req) == 3 and list(req.output_ids) == [5, 7, 0]
    assert end_of(req)[0] == "stop"


def test_an_answer_that_ends_with_given_text_is_complete(
    scheduler: FakeScheduler,
) -> None:
    req = scheduler.queue("one", length=3)
    given(req, -1, 7, 2)
    assert emit(req) == 3 and list(req.output_ids) == [0, 7, 2]
    assert end_of(req)[0] == "stop"


def test_text_behind_the_answer_is_not_handed_out(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=2)
    given(req, -1, -1, 7, 7, num_shown=2)
    assert emit(req) == 2 and list(req.output_ids) == [0, 0]
    assert end_of(req)[0] == "stop"


def test_a_stop_token_that_is_asked_for_ends_a_gap(scheduler: FakeScheduler) -> None:
    req = scheduler.queue("one", length=3, stop_token_ids=[8], ignore_eos=False)
    canvas = given(req, -1, -1, 7)
    canvas.ids[1] = 8
    assert emit(req) == 1
    assert end_of(req)[0] == "stop"
