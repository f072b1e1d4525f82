"""Admission: requests that no door checked, sizes, guidance, the order of the queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.third_party.left_to_right import Faulty, LeftToRight
from helpers.upstream_shapes import request_slot
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.registry import algorithms

prelaunched = pytest.mark.parametrize("prelaunch", [False, True])

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("a misspelled option", {"dllm": {"treshold": 0.5}}, "treshold"),
    ("an option's type", {"dllm": {"steps": "8"}}, "steps"),
    ("an unknown algorithm", {"dllm": {"algorithm": "Nope"}}, "algorithm"),
    ("options that are no object", {"dllm": [1]}, "custom_params"),
    ("a token id outside the vocabulary", {"prompt": (1, 11)}, "input_ids"),
    ("a negative token id", {"prompt": (1, -1)}, "input_ids"),
    ("an empty prompt", {"prompt": ()}, "input_ids"),
    ("no answer length", {"length": None}, "max_new_tokens"),
    ("a negative answer length", {"length": -3}, "max_new_tokens"),
    ("a fractional answer length", {"length": 2.5}, "max_new_tokens"),
    ("an answer longer than the pool", {"length": 100}, "does not fit"),
    ("an absurd answer length", {"length": 10**9}, "does not fit"),
    ("a canvas of text", {"dllm": {"canvas": ["text"]}}, "canvas"),
    ("a canvas that is no list", {"dllm": {"canvas": 5}}, "canvas"),
    ("a canvas without a mask", {"dllm": {"canvas": [{"ids": [1]}]}}, "canvas"),
    ("an absurd canvas", {"dllm": {"canvas": [{"mask": 10**12}]}}, "canvas"),
    ("a canvas longer than the pool", {"dllm": {"canvas": [{"mask": 99}]}}, "not fit"),
    (
        "a token id of a canvas outside the vocabulary",
        {"dllm": {"canvas": [{"ids": [11]}, {"mask": 1}]}},
        "canvas",
    ),
    (
        "a canvas that grows",
        {"dllm": {"canvas": [{"mask": 1}], "length": "append"}},
        "length",
    ),
    ("a seed of many bits", {"sampling_seed": 1 << 70}, "sampling_seed"),
    (
        "a delimiter outside the vocabulary",
        {"dllm": {"algorithm": "AdaBlock", "delimiter_ids": [11]}},
        "delimiter_ids",
    ),
]


@prelaunched
@pytest.mark.parametrize(
    ("request_", "word"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_a_bad_request_is_answered_alone(
    request_: dict[str, Any], word: str, prelaunch: bool
) -> None:
    """It may come by a door that checks nothing. The others do not notice."""
    scheduler = FakeScheduler(prelaunch=prelaunch)
    first = scheduler.queue("first")
    scheduler.loop()
    bad = scheduler.queue("bad", **request_)
    last = scheduler.queue("last")
    scheduler.loop()
    kind, status, message = end_of(bad)
    assert (kind, status) == ("abort", 400)
    assert word in message
    assert scheduler.sent["bad"] == [0]
    assert scheduler.running == ["first", "last"]
    scheduler.loop_to_end()
    assert [end_of(req)[0] for req in (first, last)] == ["length", "length"]
    assert scheduler.free_slots == (100, 4)


def register(monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm[Any, Any]) -> None:
    """Let requests name a third party's algorithm."""
    found = {**algorithms(), algorithm.name: algorithm}
    monkeypatch.setattr("sglang_dllm.config.resolve.algorithms", lambda: found)


class Raising(LeftToRight):
    """A third party's algorithm that fails before its first step."""

    where = ""

    def finalize(self, options: Any, answer_len: int, facts: Any) -> Any:
        return self._or_fail("finalize", options)

    def is_guided(self, options: Any) -> bool:
        return bool(self._or_fail("is_guided", False))

    @property
    def statistics(self) -> Any:  # type: ignore[override]
        return self._or_fail("statistics", ())

    def begin(self, batch: Any, options: Any) -> Any:
        self._or_fail("begin", None)
        return super().begin(batch, options)

    def _or_fail(self, here: str, value: Any) -> Any:
        if self.where == here:
            raise KeyError(f"told to fail in {here}")
        return value


@prelaunched
@pytest.mark.parametrize("where", ["finalize", "is_guided", "statistics", "begin"])
def test_an_algorithm_that_cannot_start_is_a_500(
    where: str, prelaunch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    first = scheduler.queue("first")
    scheduler.loop()
    register(monkeypatch, Raising())
    monkeypatch.setattr(Raising, "where", where)
    bad = scheduler.queue("bad", dllm={"algorithm": "Raising"})
    scheduler.loop()
    kind, status, message = end_of(bad)
    assert (kind, status) == ("abort", 500)
    assert f"told to fail in {where}" in message
    scheduler.loop_to_end()
    assert end_of(first)[0] == "length"
    assert scheduler.free_slots == (100, 4)


def test_a_fault_of_the_device_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later forward would fail too."""
    scheduler = FakeScheduler()

    def begin(*args: Any) -> None:
        raise torch.AcceleratorError("illegal address")

    monkeypatch.setattr(Faulty, "begin", begin)
    register(monkeypatch, Faulty())
    scheduler.queue("bad", dllm={"algorithm": "Faulty"})
    with pytest.raises(torch.AcceleratorError):
        scheduler.loop()


@prelaunched
@pytest.mark.parametrize("where", ["decide", "on_commit", "later_step"])
def test_an_algorithm_that_fails_later_is_a_500(
    where: str, prelaunch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch, steps_per_round=2)
    register(monkeypatch, Faulty())
    first = scheduler.queue("first")
    scheduler.loop()
    bad = scheduler.queue("bad", dllm={"algorithm": "Faulty", "where": where})
    scheduler.loop_to_end()
    kind, status, message = end_of(bad)
    assert (kind, status) == ("abort", 500)
    assert f"told to fail in {where}" in message
    assert end_of(first)[0] == "length"
    assert scheduler.free_slots == (100, 4)


def test_a_request_is_done_without_a_canvas() -> None:
    """SGLang's n > 1 warms its prefix cache with an answer of no tokens."""
    scheduler = FakeScheduler()
    req = scheduler.queue("empty", length=0)
    scheduler.loop()
    assert end_of(req)[0] == "length"
    assert scheduler.sent == {"empty": [0]}


def test_one_canvas_may_exceed_the_tokens_of_a_round() -> None:
    scheduler = FakeScheduler(max_prefill_tokens=12)
    scheduler.queue("large", length=30)
    scheduler.queue("small", length=8)
    scheduler.loop()
    assert scheduler.running == ["large"]
    scheduler.loop_to_end()
    assert scheduler.sent["small"][-1] == 8


def test_guidance_needs_the_slots_of_one_canvas() -> None:
    """Both windows read and write the same slots, so that only a forward holds two."""
    scheduler = FakeScheduler(slots=100, max_prefill_tokens=50, max_running_requests=3)
    guided = {"cfg_scale": 1.0, "steps": 8}
    scheduler.queue("guided", length=60, dllm=guided)
    scheduler.queue("plain", length=4)
    scheduler.loop()
    # 124 tokens are more than a round should have and more than the pool has slots. A
    # canvas that runs alone may have them.
    assert scheduler.running == ["guided"]
    assert scheduler.free_slots == (100 - 62, 2)
    assert scheduler.toy.model.num_windows == [2]
    scheduler.loop_to_end()
    scheduler.queue("first", length=4)
    scheduler.queue("second", length=4)
    scheduler.queue("pair", length=4, dllm=guided)
    scheduler.loop()
    assert scheduler.running == ["first", "second"], "3 windows, and it has 2"
    scheduler.loop_to_end()
    assert scheduler.sent["pair"][-1] == 4


def test_guidance_cannot_run_where_one_window_may() -> None:
    scheduler = FakeScheduler(max_running_requests=1)
    req = scheduler.queue("guided", dllm={"cfg_scale": 1.0, "steps": 8})
    behind = scheduler.queue("behind")
    scheduler.loop_to_end()
    assert end_of(req)[1] == 400
    assert "--max-running-requests" in end_of(req)[2]
    assert end_of(behind)[0] == "length"


def test_what_does_not_fit_into_an_empty_engine_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would hold back the queue for ever."""
    scheduler = FakeScheduler()
    check = "sglang_dllm.runtime.admission._check_fields"
    monkeypatch.setattr(check, lambda *args: None)
    large, behind = scheduler.queue("large", length=150), scheduler.queue("behind")
    scheduler.loop_to_end()
    assert end_of(large)[1] == 400 and "does not fit" in end_of(large)[2]
    assert end_of(behind)[0] == "length"
    assert scheduler.free_slots == (100, 4)


def test_slots_do_not_keep_the_free_list_in_memory() -> None:
    scheduler = FakeScheduler()
    req = scheduler.queue("one")
    scheduler.loop()
    slots = req.dllm_algo_state.canvas.kv_slots
    assert slots.untyped_storage().nbytes() == 10 * 8
    index = req.dllm_algo_state.canvas.req_pool_index
    assert index == request_slot(req)
    table = scheduler.req_to_token_pool.req_to_token[index, :10]
    assert torch.equal(table.long(), slots)
