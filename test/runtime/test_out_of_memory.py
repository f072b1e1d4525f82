"""A forward without memory: its requests end with status 500, the others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.toy_engine import ToyEngine, alone, outcome
from sglang_dllm.decoding.algorithms.llada import LLaDA
from sglang_dllm.decoding.guard import OUT_OF_MEMORY, is_out_of_memory
from sglang_dllm.decoding.logits import HeadError

SLOTS = (100, 4)
"""Free KV slots and request slots of an idle scheduler."""

prelaunched = pytest.mark.parametrize("prelaunch", [False, True])


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Process 77 has 3 GiB in use.")


def fails_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose call of that number, counted from 1, finds no memory."""
    num_calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise no_memory()
        return function(*args)

    return wrapped


@prelaunched
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("where", ["launch", "pack", "commit", "sync"])
def test_the_requests_of_the_forward_end_and_the_others_are_served(
    where: str, call: int, prelaunch: bool
) -> None:
    scheduler = FakeScheduler(prelaunch=prelaunch)
    owner = scheduler.toy.model if where == "launch" else scheduler.toy.denoiser
    setattr(owner, where, fails_at(call, getattr(owner, where)))
    reqs = [scheduler.queue(f"{i}", 8, (1, i)) for i in range(7)]
    scheduler.loop_to_end()
    ends = [end_of(req) for req in reqs]
    assert ends[:4] == [("abort", 500, OUT_OF_MEMORY)] * 4
    for i, req in enumerate(reqs[4:], 4):
        other = FakeScheduler()
        wanted = other.queue("alone", 8, (1, i))
        other.loop_to_end()
        assert end_of(req)[0] == "length"
        assert list(req.output_ids) == list(wanted.output_ids)
    assert scheduler.free_slots == SLOTS
    assert scheduler.engine.canvases == scheduler.toy.denoiser.canvases == []
    counted = scheduler.toy.metrics.counts
    assert len(counted) == 7 and set(counted.values()) == {1}


def test_a_pause_that_finds_no_memory_lets_the_rest_join() -> None:
    """The forward in flight is finished there, outside of a round."""
    setup = ToyEngine(1, prelaunch=True)
    lost = setup.add(1, "LLaDA", steps=12)
    setup.engine.run_round()
    late = setup.add(2, "LLaDA", steps=12)
    commit = fails_at(1, setup.denoiser.commit)
    setup.denoiser.commit = commit  # type: ignore[method-assign]
    setup.engine.finish_in_flight()
    assert (lost.failure, late.failure) == (OUT_OF_MEMORY, None)
    setup.run_to_end()
    assert outcome(late) == alone(2, "LLaDA", steps=12)


@prelaunched
def test_the_decision_of_one_algorithm_ends_its_own_requests(prelaunch: bool) -> None:
    setup = ToyEngine(1, prelaunch)
    other = setup.add(1, "Dream", steps=9)
    lost = setup.add(2, "LLaDA", steps=12)
    setup.engine.run_round()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLaDA, "decide", fails_at(1, LLaDA.decide))
        setup.run_to_end()
    assert lost.failure == f"LLaDA: {OUT_OF_MEMORY}"
    assert outcome(other) == alone(1, "Dream", steps=9)


def test_a_canvas_that_cannot_be_made_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = FakeScheduler()
    monkeypatch.setattr(LLaDA, "begin", fails_at(2, LLaDA.begin))
    reqs = [scheduler.queue(f"{i}", 8, (1, i)) for i in range(3)]
    scheduler.loop_to_end()
    assert [end_of(req)[1] for req in reqs] == [None, 500, None]
    assert end_of(reqs[1])[2] == OUT_OF_MEMORY
    assert scheduler.free_slots == SLOTS


@pytest.mark.parametrize("where", ["launch", "commit", "decide"])
def test_one_of_several_ranks_ends_the_launch(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may have had the memory, and wait in a collective."""
    setup = ToyEngine(agree=lambda event: None)
    setup.add(1, "LLaDA", steps=12)
    owner = {"launch": setup.model, "commit": setup.denoiser, "decide": LLaDA}[where]
    monkeypatch.setattr(owner, where, fails_at(1, getattr(owner, where)))
    with pytest.raises(torch.OutOfMemoryError):
        setup.engine.run_round()


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 34359738368 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_the_errors_of_other_allocators_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    wrapped = HeadError("the head failed")
    wrapped.__cause__ = RuntimeError(text)
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: illegal memory access"))
