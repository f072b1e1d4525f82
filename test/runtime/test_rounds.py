"""Rounds: aborts, timeouts, retractions and pauses, with a forward in flight or not."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.third_party.left_to_right import Faulty
from helpers.upstream_shapes import mark_overdue
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.runtime import rounds

prelaunched = pytest.mark.parametrize("prelaunch", [False, True])


def answers(length: int, num: int) -> list[list[int]]:
    """The tokens of each request when it is alone."""
    found = []
    for i in range(num):
        scheduler = FakeScheduler()
        req = scheduler.queue("alone", length, (1, i))
        scheduler.loop_to_end()
        found.append(list(req.output_ids))
    return found


def abort(req: Any) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    req.to_finish = FINISH_ABORT()


@prelaunched
def test_an_abort_ends_a_request_before_another_forward(prelaunch: bool) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    reqs = [scheduler.queue(f"{i}", 8, (1, i)) for i in range(3)]
    scheduler.loop(2)
    launches, sent = scheduler.toy.launches(), len(reqs[1].output_ids)
    abort(reqs[1])
    rounds.end_aborted(scheduler, scheduler.running_batch)
    assert scheduler.toy.launches() == launches
    assert scheduler.running == ["0", "2"]
    # The tokens went out before the forward in flight was waited for.
    assert scheduler.sent["1"][-1] == sent
    scheduler.loop_to_end()
    assert end_of(reqs[1])[0] == "abort"
    alone = answers(8, 3)
    assert [list(reqs[i].output_ids) for i in (0, 2)] == [alone[0], alone[2]]
    assert scheduler.free_slots == (100, 4)


@prelaunched
def test_an_abort_in_the_queue_takes_no_slots(prelaunch: bool) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    scheduler.queue("runs")
    scheduler.loop()
    free = scheduler.free_slots
    waiting = scheduler.queue("waits")
    abort(waiting)
    scheduler.loop()
    assert end_of(waiting)[0] == "abort"
    assert scheduler.free_slots == free


@prelaunched
def test_the_running_timeout_ends_a_request_before_another_forward(
    prelaunch: bool,
) -> None:
    """SGLANG_REQ_RUNNING_TIMEOUT: SGLang's own check marks the old request."""
    from sglang.srt.environ import envs

    scheduler = FakeScheduler(prelaunch=prelaunch)
    old, young = scheduler.queue("old"), scheduler.queue("young")
    scheduler.loop()
    now = time.perf_counter()
    old.time_stats.forward_entry_time = now - 60.0
    young.time_stats.forward_entry_time = now
    with envs.SGLANG_REQ_RUNNING_TIMEOUT.override(30.0):
        mark_overdue(scheduler)
    scheduler.running_batch.batch_is_full = True
    launches = scheduler.toy.launches()
    rounds.end_aborted(scheduler, scheduler.running_batch)
    assert scheduler.toy.launches() == launches
    assert scheduler.running == ["young"]
    assert not scheduler.running_batch.batch_is_full
    kind, status, message = end_of(old)
    assert (kind, status) == ("abort", 503) and "timeout" in message
    scheduler.loop_to_end()
    assert end_of(young)[0] == "length"


@prelaunched
@pytest.mark.parametrize("loops", [1, 3])
def test_retracted_requests_go_on_where_they_were(loops: int, prelaunch: bool) -> None:
    """No token goes out twice, and none is decided again."""
    scheduler = FakeScheduler(prelaunch=prelaunch)
    reqs = [scheduler.queue(f"{i}", 8, (1, i)) for i in range(3)]
    scheduler.loop(loops)
    slots = [req.dllm_algo_state.canvas.kv_slots for req in reqs]
    scheduler.retract_all()
    assert scheduler.free_slots == (100, 4)
    scheduler.queue("between", length=4)
    scheduler.loop_to_end()
    assert [list(req.output_ids) for req in reqs] == answers(8, 3)
    assert scheduler.free_slots == (100, 4)
    for req in reqs:
        counts = scheduler.sent[req.rid]
        assert counts == sorted(set(counts)), "the same tokens twice"
    assert len(slots) == 3


@prelaunched
def test_a_retracted_request_may_be_aborted(prelaunch: bool) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    kept, gone = scheduler.queue("kept", 8, (1, 0)), scheduler.queue("gone")
    scheduler.loop()
    scheduler.retract_all()
    # SGLang takes an aborted request out of the queue itself.
    scheduler.waiting_queue.remove(gone)
    scheduler.loop_to_end()
    assert [list(kept.output_ids)] == answers(8, 1)
    assert scheduler.engine.canvases == []
    assert scheduler.free_slots == (100, 4)


@prelaunched
def test_a_retracted_request_whose_algorithm_failed_leaves(
    prelaunch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prelaunch it fails in the forward that was in flight at the retraction."""
    found = {**algorithms(), "Faulty": Faulty()}
    monkeypatch.setattr("sglang_dllm.config.resolve.algorithms", lambda: found)
    scheduler = FakeScheduler(prelaunch=prelaunch)
    sound = scheduler.queue("sound", 8, (1, 0))
    options = {"algorithm": "Faulty", "where": "nowhere"}
    failing = scheduler.queue("failing", dllm=options)
    scheduler.loop()
    monkeypatch.setattr(Faulty, "decide", lambda *args: 1 / 0)
    scheduler.retract_all()
    scheduler.loop_to_end()
    assert end_of(failing)[:2] == ("abort", 500)
    assert [list(sound.output_ids)] == answers(8, 1)
    assert scheduler.free_slots == (100, 4)


@prelaunched
def test_a_pause_begins_with_no_forward_in_flight(prelaunch: bool) -> None:
    """An update of the weights in between must not meet hidden states of the old."""
    from sglang_dllm.patches.scheduler import _pause_generation

    scheduler = FakeScheduler(prelaunch=prelaunch)
    req = scheduler.queue("one", 8, (1, 0))
    scheduler.loop(2)
    assert (scheduler.engine.in_flight is not None) == prelaunch
    seen: list[Any] = []

    def original(found: Any, request: Any) -> str:
        seen.append((found.engine.in_flight, request))
        return "paused"

    assert _pause_generation(original, scheduler, "in_place") == "paused"
    assert seen == [(None, "in_place")]
    scheduler.loop_to_end()
    assert [list(req.output_ids)] == answers(8, 1)


def change(scheduler: FakeScheduler, name: str, **during: Any) -> None:
    """A call of SGLang's weight updater, which sets attributes of it."""
    from sglang_dllm.patches.weight_updater import HOOKS

    (hook,) = [hook for hook in HOOKS if hook.target.endswith(f".{name}")]

    def original(updater: Any, request: Any) -> str:
        assert scheduler.engine.in_flight is None
        assert not scheduler.toy.model.has_graphs
        vars(updater).update(during)
        return "changed"

    assert hook.fn(original, scheduler.weight_updater, "request") == "changed"


@prelaunched
def test_a_change_of_the_weights_drops_the_graphs(prelaunch: bool) -> None:
    """A graph would read the old weights, or memory that is not the server's."""
    scheduler = FakeScheduler(prelaunch=prelaunch)
    req = scheduler.queue("one", 8, (1, 0))
    scheduler.loop(2)
    change(scheduler, "update_weights_from_disk")
    assert scheduler.toy.model.has_graphs
    # One of many calls: the graphs come back before the next round, once.
    for name in ("tensor", "tensor", "distributed", "ipc"):
        change(scheduler, f"update_weights_from_{name}")
        assert not scheduler.toy.model.has_graphs
    scheduler.loop()
    assert scheduler.toy.model.has_graphs
    assert scheduler.toy.events.count("capture") == 2
    scheduler.loop_to_end()
    assert [list(req.output_ids)] == answers(8, 1)


def test_graphs_come_back_when_the_change_is_over() -> None:
    scheduler = FakeScheduler()
    model = scheduler.toy.model
    change(scheduler, "release_memory_occupation", offload_tags={"weights", "kv"})
    change(scheduler, "resume_memory_occupation", offload_tags={"kv"})
    assert not model.has_graphs
    change(scheduler, "resume_memory_occupation", offload_tags=set())
    assert model.has_graphs
    # In a session of updates, the last call may still replace the weights.
    change(scheduler, "update_weights_from_tensor", _session="open")
    scheduler.queue("one", 8, (1, 0))
    scheduler.loop()
    assert not model.has_graphs
    scheduler.weight_updater._session = None
    scheduler.loop_to_end()
    assert model.has_graphs


@prelaunched
def test_a_failure_at_a_pause_is_answered_behind_it(
    prelaunch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {**algorithms(), "Faulty": Faulty()}
    monkeypatch.setattr("sglang_dllm.config.resolve.algorithms", lambda: found)
    scheduler = FakeScheduler(prelaunch=prelaunch)
    sound = scheduler.queue("sound", 8, (1, 0))
    failing = scheduler.queue("failing", dllm={"algorithm": "Faulty", "where": ""})
    scheduler.loop()
    monkeypatch.setattr(Faulty, "decide", lambda *args: 1 / 0)
    rounds.before_pause(scheduler)
    scheduler.loop_to_end()
    assert end_of(failing)[:2] == ("abort", 500)
    assert [list(sound.output_ids)] == answers(8, 1)


@prelaunched
def test_a_storm_leaves_every_slot_free(prelaunch: bool) -> None:
    """Arrivals, aborts and retractions in every order."""
    import random

    rng = random.Random(4)
    scheduler = FakeScheduler(slots=60, prelaunch=prelaunch, steps_per_round=2)
    alone = answers(8, 8)
    reqs: list[tuple[int, Any]] = []
    for turn in range(120):
        if rng.random() < 0.4:
            kind = rng.randrange(8)
            reqs.append((kind, scheduler.queue(f"{turn}", 8, (1, kind))))
        if rng.random() < 0.1 and scheduler.running_batch.reqs:
            abort(rng.choice(scheduler.running_batch.reqs))
        if rng.random() < 0.05:
            scheduler.retract_all()
        scheduler.loop()
        held = [r.dllm_algo_state.canvas for r in scheduler.running_batch.reqs]
        assert set(map(id, held)) == set(map(id, scheduler.engine.canvases))
        assert scheduler.free_slots[0] == 60 - sum(map(len, held))
    scheduler.loop_to_end()
    assert scheduler.free_slots == (60, 4)
    assert scheduler.engine.in_flight is None
    for kind, req in reqs:
        tokens = list(req.output_ids)
        ended = end_of(req)[0]
        assert tokens == (
            alone[kind] if ended == "length" else alone[kind][: len(tokens)]
        )
    assert {end_of(req)[0] for _, req in reqs} == {"length", "abort"}


def test_the_algorithm_builds_its_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_dllm.runtime import dllm_algorithm

    built: list[Any] = []

    def build(scheduler: Any) -> Any:
        built.append(scheduler)
        ran = SimpleNamespace(in_graph=True)
        return SimpleNamespace(run_round=lambda: built.append("round"), model=ran)

    monkeypatch.setattr(dllm_algorithm, "build_engine", build)
    monkeypatch.setattr(dllm_algorithm, "build_round_log", lambda scheduler: None)
    config = SimpleNamespace(block_size=1, mask_id=3, first_done_first_out_mode=True)
    algorithm = dllm_algorithm.FullAttnAlgorithm(config)
    with pytest.raises(AssertionError, match="has started"):
        algorithm.run(None, None)
    assert algorithm.engine_of("scheduler") is algorithm.engine_of("scheduler")
    assert algorithm.run(None, None)[-1] is True
    assert built == ["scheduler", "round"]
