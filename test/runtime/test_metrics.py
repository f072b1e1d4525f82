"""Metrics without a server: waste, phases, refusals, the line of the log."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest

from helpers.fake_scheduler import FakeScheduler
from sglang_dllm.config.refusals import Refusals
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.errors import RequestError
from sglang_dllm.runtime.metrics import Metrics, num_wasted
from sglang_dllm.runtime.round_log import RoundLog
from sglang_dllm.runtime.step_clock import StepClock

EOS, MASK = 2, 3


def canvas_of(answer: list[int], num_committed: int, **fields: Any) -> Canvas:
    canvas = Canvas.from_prompt([1], len(answer), mask_id=MASK, eos_ids=(EOS,))
    canvas.ids[1:] = answer
    canvas.masked[1:] = np.asarray(answer) == MASK
    canvas.num_committed = num_committed
    for name, value in fields.items():
        setattr(canvas, name, value)
    return canvas


@pytest.mark.parametrize(
    ("answer", "num_committed", "wasted"),
    [
        ([5, 6, EOS, 7, 8], 5, 2),
        # A rule filled the two behind the EOS.
        ([5, 6, EOS, EOS, EOS], 3, 0),
        ([5, 6, EOS, EOS, MASK], 4, 1),
        ([5, 6, 7, 8, 9], 5, 0),
    ],
)
def test_tokens_behind_the_eos_are_wasted(
    answer: list[int], num_committed: int, wasted: int
) -> None:
    assert num_wasted(canvas_of(answer, num_committed)) == wasted
    assert num_wasted(canvas_of(answer, num_committed, ignore_eos=True)) == 0


def values(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(name, labels)


def test_a_client_cannot_add_labels() -> None:
    refusals = Refusals(SimpleNamespace(labels={"model_name": "m"}), {"steps"})
    for text in ("custom_params.steps=0 is not allowed", "my_field=1", "{}: no", ""):
        with pytest.raises(RequestError), refusals.counted("body"):
            raise RequestError(text)
    name, one = "sglang:dllm_refusals_total", {"model_name": "m", "stage": "body"}
    assert values(name, **one, field="steps") == 1
    assert values(name, **one, field="other") == 3


def test_nothing_is_registered_or_counted_where_metrics_are_off() -> None:
    metrics = Metrics(None)
    metrics.launched("eager")
    metrics.ended(canvas_of([5], 1))
    metrics.refused(RequestError("x"))
    metrics.took("host", 1)
    metrics.active([canvas_of([5], 1)], 0)
    assert values("sglang:dllm_active_canvases") is None


class Phases:
    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def took(self, phase: str, seconds: float) -> None:
        self.seconds.setdefault(phase, []).append(seconds)


def test_the_time_of_a_round_is_split_and_idle_time_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases, now = Phases(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock(phases, "cpu")
    for idle in (False, False, True, False):
        clock.round_begins()
        clock.step_begins()
        now[0] += 4
        clock.launched()
        now[0] += 2
        clock.decided()
        clock.synced()
        clock.round_ends()
        now[0] += 1
        if idle:
            clock.rests()
    # The third gap was idle.
    assert phases.seconds == {"forward": 4 * [4], "decision": 4 * [2], "host": 2 * [1]}


def test_an_engine_marks_each_step_and_rests_when_it_is_empty() -> None:
    scheduler, phases = FakeScheduler(), Phases()
    scheduler.engine.clock = StepClock(phases, "cpu")
    for _ in range(2):
        scheduler.queue("a")
        scheduler.loop_to_end()
    steps = len(phases.seconds["forward"])
    assert steps == scheduler.engine.num_canvas_forwards
    assert len(phases.seconds["host"]) == steps - 2, "none between the two requests"
    assert scheduler.toy.metrics.num_active == 0


def test_a_line_of_the_log_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 2.0, 4.0])
    log = RoundLog(4, lambda: next(clock))
    with caplog.at_level(logging.INFO):
        for number in range(1, 8):
            log.add(number, 10, 5 * number, num_canvases=3, num_queued=1)
    first, second = caplog.messages
    assert first == (
        "Canvases: 3, queue: 1, tokens: 10.0/s, forwards of canvases: 10, "
        "tokens per forward: 2.00"
    )
    assert "tokens: 20.0/s" in second and "tokens per forward: 2.00" in second


def test_an_error_names_its_request(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = FakeScheduler()
    scheduler.queue("broken")
    scheduler.loop()
    scheduler.engine.canvases[0].fail("the algorithm broke")
    scheduler.loop_to_end()
    assert "request broken failed: the algorithm broke" in caplog.text


def test_admission_counts_what_it_refuses() -> None:
    scheduler = FakeScheduler()
    scheduler.queue("long", length=100_000)
    scheduler.loop()
    (message,) = scheduler.toy.metrics.refusals
    assert message.startswith("max_new_tokens=100000")
