"""The denoising engine with a toy model: rounds, arrivals, departures and failures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.third_party.left_to_right import Faulty, LeftToRight
from helpers.toy_engine import ToyEngine, alone, outcome
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.runtime.engine import DenoisingEngine

LEFT, FAULTY = LeftToRight(), Faulty()

prelaunched = pytest.mark.parametrize("prelaunch", [False, True])


@prelaunched
@pytest.mark.parametrize("steps", [1, 3])
def test_a_crowd_that_comes_and_goes_decodes_as_each_alone(
    steps: int, prelaunch: bool
) -> None:
    setup = ToyEngine(steps, prelaunch)
    kinds = [
        ("LLaDA", {"steps": 6}),
        ("EntropyThreshold", {"block_size": 4}),
        ("LLaDA", {"cfg_scale": 1.0, "steps": 12}),
        ("Dream", {"steps": 9}),
    ]
    canvases = []
    for number in range(12):
        name, options = kinds[number % 4]
        canvases.append(setup.add(number, name, **options))
        setup.engine.run_round()
        setup.engine.release([c for c in setup.engine.canvases if c.done])
    setup.run_to_end()
    assert max(setup.model.num_windows) > 2
    assert setup.engine.in_flight is None and setup.denoiser.canvases == []
    for number, canvas in enumerate(canvases):
        name, options = kinds[number % 4]
        assert outcome(canvas) == alone(number, name, **options), number
        assert setup.metrics.counts[id(canvas)] == 1


@prelaunched
def test_a_round_has_its_steps(prelaunch: bool) -> None:
    setup = ToyEngine(4, prelaunch)
    canvas = setup.add(1, "LLaDA", steps=12)
    found = []
    for _ in range(3):
        setup.engine.run_round()
        found.append((canvas.num_forwards, setup.launches()))
    first, second = ((4, 5), (8, 9)) if prelaunch else ((4, 4), (8, 8))
    assert found == [first, second, (12, 12)]
    assert canvas.done and setup.engine.in_flight is None


@prelaunched
def test_a_round_ends_when_a_canvas_is_done(prelaunch: bool) -> None:
    """Its tokens go out at once, and no forward runs over it again."""
    setup = ToyEngine(8, prelaunch)
    long, short = setup.add(1, "LLaDA", steps=12), setup.add(2, "LLaDA", steps=3)
    setup.engine.run_round()
    assert (long.num_forwards, short.num_forwards) == (3, 3)
    assert short.done and setup.engine.in_flight is None
    setup.engine.run_round()
    assert setup.launches() == 3, "a round with a canvas that is done launches nothing"
    setup.engine.release([short])
    setup.run_to_end()
    assert outcome(long) == alone(1, "LLaDA", steps=12)


@prelaunched
def test_an_arrival_waits_for_the_forward_in_flight(prelaunch: bool) -> None:
    setup = ToyEngine(1, prelaunch)
    first = setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    assert (setup.engine.in_flight is not None) == prelaunch
    second = setup.add(2, "LLaDA", steps=12)
    assert setup.denoiser.canvases == [first]
    setup.engine.run_round()
    assert setup.denoiser.canvases == [first, second]
    # With prelaunch, the forward of this round was launched before the second came.
    assert setup.model.num_windows == ([1, 1, 2] if prelaunch else [1, 2])
    assert second.num_forwards == (0 if prelaunch else 1)
    setup.run_to_end()
    assert outcome(second) == alone(2, "LLaDA", steps=12)


def test_the_order_of_a_commit() -> None:
    """The host waits last, when the device knows the next step."""
    setup = ToyEngine(1, prelaunch=True)
    setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    setup.events.clear()
    setup.engine.finish_in_flight()
    assert setup.events == ["commit", "sync"]
    setup.engine.run_round()
    setup.add(2, "LLaDA", steps=12)
    setup.events.clear()
    setup.engine.finish_in_flight()
    assert setup.events == ["commit", "join", "sync"]
    setup.events.clear()
    setup.engine.finish_in_flight()
    assert setup.events == []


def test_the_logits_are_dropped_before_the_next_forward() -> None:
    import weakref

    setup = ToyEngine(1, prelaunch=True)
    setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    assert setup.engine.in_flight is not None
    logits = weakref.ref(setup.engine.in_flight.logits)
    alive = []
    setup.denoiser.sync = lambda: alive.append(logits())  # type: ignore[method-assign]
    setup.engine.finish_in_flight()
    assert alive == [None]


@prelaunched
@pytest.mark.parametrize("steps", [1, 3])
def test_an_abort_leaves_the_others_as_they_are(steps: int, prelaunch: bool) -> None:
    setup = ToyEngine(steps, prelaunch)
    canvases = [setup.add(number, "LLaDA", steps=12) for number in range(3)]
    setup.engine.run_round()
    before = canvases[1].num_forwards
    setup.engine.release([canvases[1]])
    # The forward in flight was one of all three canvases, and it counts.
    assert canvases[1].num_forwards == before + prelaunch
    assert setup.engine.in_flight is None
    assert setup.metrics.counts == {id(canvases[1]): 1}
    setup.run_to_end()
    for number in (0, 2):
        assert outcome(canvases[number]) == alone(number, "LLaDA", steps=12)


@prelaunched
def test_an_arrival_may_leave_before_it_joins(prelaunch: bool) -> None:
    setup = ToyEngine(1, prelaunch)
    kept = setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    gone, other = setup.add(2), setup.add(3, "LLaDA", steps=6)
    setup.engine.release([gone])
    setup.run_to_end()
    assert gone.num_forwards == 0 and setup.metrics.counts[id(gone)] == 1
    assert outcome(kept) == alone(1, "LLaDA", steps=12)
    assert outcome(other) == alone(3, "LLaDA", steps=6)


@prelaunched
def test_the_last_canvas_may_leave_during_a_forward(prelaunch: bool) -> None:
    setup = ToyEngine(1, prelaunch)
    canvas = setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    setup.engine.release([canvas])
    assert setup.engine.in_flight is None and setup.denoiser.canvases == []
    setup.engine.run_round()
    assert setup.launches() == 1 + prelaunch, "a round without canvases is empty"
    later = setup.add(2, "LLaDA", steps=4)
    setup.run_to_end()
    assert outcome(later) == alone(2, "LLaDA", steps=4)


@prelaunched
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_retracted_canvas_goes_on_where_it_was(rounds: int, prelaunch: bool) -> None:
    setup = ToyEngine(1, prelaunch)
    canvases = [setup.add(number, "LLaDA", steps=12) for number in range(3)]
    for _ in range(rounds):
        setup.engine.run_round()
    away = canvases[:2]
    groups = setup.engine.park(away)
    assert setup.engine.canvases == canvases[2:]
    assert setup.engine.in_flight is None
    for _ in range(3):
        setup.engine.run_round()
    for group in groups:
        assert group is not None
        setup.engine.admit(group)
    setup.run_to_end()
    for number, canvas in enumerate(canvases):
        assert outcome(canvas) == alone(number, "LLaDA", steps=12)


def test_all_canvases_may_be_retracted_during_a_forward() -> None:
    setup = ToyEngine(2, prelaunch=True)
    canvases = [setup.add(number, "LLaDA", steps=12) for number in range(2)]
    setup.engine.run_round()
    groups = setup.engine.park(canvases)
    assert [canvas.num_forwards for canvas in canvases] == [3, 3]
    setup.engine.run_round()
    assert setup.launches() == 3, "nothing is left to run"
    for group in groups:
        assert group is not None
        setup.engine.admit(group)
    setup.run_to_end()
    assert outcome(canvases[0]) == alone(0, "LLaDA", steps=12)


@prelaunched
def test_a_canvas_that_is_done_is_parked_done(prelaunch: bool) -> None:
    setup = ToyEngine(4, prelaunch)
    canvas = setup.add(1, "LLaDA", steps=2)
    setup.engine.run_round()
    (group,) = setup.engine.park([canvas])
    assert group is not None
    setup.engine.admit(group)
    launches = setup.launches()
    setup.run_to_end()
    assert canvas.done and setup.launches() == launches


def raising(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("told to fail")


@prelaunched
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("where", ["decide", "shape", "on_commit", "later_step"])
def test_an_algorithm_that_fails_ends_its_own_canvases(
    where: str, steps: int, prelaunch: bool
) -> None:
    setup = ToyEngine(steps, prelaunch)
    sound = setup.add(1, "LLaDA", steps=12)
    other = setup.add(2, LEFT)
    setup.engine.run_round()
    first = setup.add(4, FAULTY, where=where)
    setup.engine.run_round()
    second = setup.add(5, FAULTY, where=where)
    setup.run_to_end()
    for canvas in (first, second):
        assert canvas.failure is not None and "Faulty" in canvas.failure
        assert setup.metrics.counts[id(canvas)] == 1
    assert outcome(sound) == alone(1, "LLaDA", steps=12)
    assert outcome(other) == alone(2, LEFT)
    # The algorithm may be asked again.
    third = setup.add(6, FAULTY, where="nowhere")
    setup.run_to_end()
    assert third.failure is None and third.done


@prelaunched
def test_a_round_ends_when_a_canvas_fails(prelaunch: bool) -> None:
    """The request is answered at once, and no forward waits for its release."""
    setup = ToyEngine(5, prelaunch)
    sound = setup.add(1, "LLaDA", steps=12)
    failed = setup.add(2, FAULTY, where="decide")
    setup.engine.run_round()
    assert failed.failure is not None and sound.num_forwards == 1
    assert setup.engine.in_flight is None
    assert failed in setup.engine.canvases, "it stays until it is released"


@prelaunched
def test_a_canvas_that_cannot_join_fails_alone(
    prelaunch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prelaunch, it joins behind a commit, where nothing guarded it before."""
    setup = ToyEngine(1, prelaunch)
    sound = setup.add(1, "LLaDA", steps=12)
    first = setup.add(4, LEFT)
    setup.engine.run_round()
    second, group = setup.prepare(5, LEFT)
    monkeypatch.setattr(type(group), "joined", raising)
    setup.engine.admit(group)
    setup.engine.run_round()
    assert second.failure is not None and "told to fail" in second.failure
    monkeypatch.undo()
    setup.run_to_end()
    assert outcome(sound) == alone(1, "LLaDA", steps=12)
    assert outcome(first) == alone(4, LEFT)


@prelaunched
def test_a_canvas_that_fails_while_it_is_parked_has_no_group(prelaunch: bool) -> None:
    """A retraction commits the forward in flight, and the algorithm may fail in it."""
    setup = ToyEngine(1, prelaunch)
    sound = setup.add(1, "LLaDA", steps=12)
    failing_later = setup.add(4, FAULTY, where="later_step")
    setup.engine.run_round()
    groups = setup.engine.park([failing_later, sound])
    assert groups[1] is not None
    assert (groups[0] is None) == (failing_later.failure is not None)
    setup.engine.admit(groups[1])
    setup.run_to_end()
    assert outcome(sound) == alone(1, "LLaDA", steps=12)


class DeviceError(RuntimeError):
    """Stands for a CUDA error."""


@prelaunched
@pytest.mark.parametrize("where", ["launch", "launch_step"])
def test_a_failure_of_the_forward_is_not_hidden(where: str, prelaunch: bool) -> None:
    """It is no algorithm's fault; the scheduler must end, as with any model."""
    setup = ToyEngine(1, prelaunch)
    canvas = setup.add(1, "LLaDA", steps=12)

    def broken(*args: Any) -> Any:
        raise DeviceError("illegal memory access")

    setattr(setup.model, where, broken)
    with pytest.raises(DeviceError):
        setup.engine.run_round()
    assert setup.engine.in_flight is None
    assert canvas.failure is None


def test_a_launch_ahead_that_fails_is_not_hidden() -> None:
    setup = ToyEngine(1, prelaunch=True)
    setup.add(1, "LLaDA", steps=12)
    launch: Callable[..., Logits] = setup.model.launch

    def once(packed: Any) -> Logits:
        if setup.launches():
            raise DeviceError("illegal memory access")
        return launch(packed)

    setup.model.launch = once  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        setup.engine.run_round()
    assert setup.engine.in_flight is None


def test_a_failing_commit_is_not_hidden() -> None:
    """The denoiser guards the algorithms. An error behind that is the device's."""
    setup = ToyEngine(1, prelaunch=True)
    setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()

    def broken(logits: Any) -> None:
        raise DeviceError("illegal memory access")

    setup.denoiser.commit = broken  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        setup.engine.finish_in_flight()
    assert setup.engine.in_flight is None


def test_a_prepared_canvas_changes_nothing() -> None:
    """``prepare`` may raise; then nobody has heard of the canvas."""
    setup = ToyEngine(1, prelaunch=True)
    sound = setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    for where in ("begin", "next_step"):
        with pytest.raises(RuntimeError, match=f"told to fail in {where}"):
            setup.prepare(4, FAULTY, where=where)
    assert setup.engine.canvases == [sound]
    setup.run_to_end()
    assert outcome(sound) == alone(1, "LLaDA", steps=12)


def test_nothing_to_do_costs_nothing() -> None:
    """Empty calls must not wait for the forward in flight."""
    setup = ToyEngine(1, prelaunch=True)
    setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    in_flight = setup.engine.in_flight
    setup.engine.release([])
    assert setup.engine.park([]) == []
    assert setup.engine.in_flight is in_flight is not None


def test_the_engine_is_built_whole() -> None:
    """No attribute waits for another module to write it."""
    with pytest.raises(TypeError):
        DenoisingEngine(SimpleNamespace())  # type: ignore[call-arg, arg-type]
