"""Two ranks in threads of one process: an error of an algorithm on one rank alone ends
both, and none of them waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.third_party.left_to_right import Faulty
from helpers.toy_engine import ToyEngine, outcome
from sglang_dllm.decoding.agreement import Agree, Event, RanksDiffer, alone
from sglang_dllm.decoding.guard import Guard, is_device_fault
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.runtime.agreement import agreement_of

SECONDS = 20
"""A rank that waits longer than this hangs."""


class Meeting:
    """A collective of two threads: each gets what the other one brings."""

    def __init__(self) -> None:
        self._brought: dict[int, Any] = {}
        self._barrier = threading.Barrier(2, timeout=SECONDS)

    def exchange(self, rank: int, value: Any) -> Any:
        """Raises BrokenBarrierError if the other rank does not come."""
        self._brought[rank] = value
        self._barrier.wait()
        other = self._brought[1 - rank]
        self._barrier.wait()
        return other


class Rank:
    """An engine whose head is a collective of both ranks."""

    def __init__(self, rank: int, agreement: Meeting, head: Meeting) -> None:
        self.rank, self._agreement = rank, agreement
        self._head = head
        self.setup = ToyEngine(agree=self.agree)
        launch = self.setup.model.launch

        def launch_with_head(packed: PackedForward) -> Logits:
            known = launch(packed)
            every = slice(0, known.num_candidates)
            return Logits.of_hidden(known(every), self.head, known.vocab_size)

        self.setup.model.launch = launch_with_head  # type: ignore[method-assign]

    def agree(self, event: Event) -> None:
        if self._agreement.exchange(self.rank, event) != event:
            raise RanksDiffer(event.name)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        self.agree(Event.HEAD)
        assert self._head.exchange(self.rank, len(rows)) == len(rows)
        return rows


def on_both(run: Callable[[Rank], Any]) -> list[Any]:
    """The results of ``run``, or its errors, by rank."""
    agreement, head = Meeting(), Meeting()
    found: list[Any] = [None, None]

    def target(number: int) -> None:
        try:
            found[number] = run(Rank(number, agreement, head))
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=target, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


WHERE = ("decide", "on_commit", "later_step", "shape")


@pytest.mark.parametrize("where", WHERE)
def test_an_error_on_one_rank_ends_both(where: str) -> None:
    """The other rank is about to ask for logits, or to launch the next forward."""

    def run(rank: Rank) -> None:
        rank.setup.add(1, Faulty(), where=where if rank.rank == 1 else "nowhere")
        rank.setup.add(2, "LLaDA", steps=12, cfg_scale=1.0)
        rank.setup.run_to_end()

    for error in on_both(run):
        assert is_device_fault(error), error


@pytest.mark.parametrize("where", WHERE)
def test_an_error_on_both_ranks_ends_its_request_alone(where: str) -> None:
    def run(rank: Rank) -> Any:
        faulty = rank.setup.add(1, Faulty(), where=where)
        other = rank.setup.add(2, "LLaDA", steps=12, cfg_scale=1.0)
        rank.setup.run_to_end()
        assert faulty.failure is not None
        return outcome(other)

    first, second = on_both(run)
    assert first == second, "or an error"


def test_an_error_on_one_rank_alone_would_hang_without_the_agreement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(f"{__name__}.SECONDS", 2)
    monkeypatch.setattr(Rank, "agree", lambda self, event: None)

    def run(rank: Rank) -> None:
        rank.setup.add(1, Faulty(), where="decide" if rank.rank == 1 else "nowhere")
        rank.setup.run_to_end()

    first, _ = on_both(run)
    assert isinstance(first.__cause__, threading.BrokenBarrierError), first


def test_a_guard_tells_the_other_ranks_of_its_end() -> None:
    events: list[Event] = []
    with Guard(lambda error: None, events.append):
        pass
    with Guard(lambda error: None, events.append) as guard:
        raise ValueError
    assert guard.caught
    with (
        pytest.raises(torch.OutOfMemoryError),
        Guard(lambda error: None, events.append),
    ):
        raise torch.OutOfMemoryError
    assert events == [Event.DONE, Event.FAILED], "a fault ends the process at once"


def test_one_rank_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 1)
    assert agreement_of(None) is alone


def test_ranks_agree_through_torch(tmp_path: Any) -> None:
    """``agreement_of`` itself, in two processes with gloo."""
    file = tmp_path / "store"
    torch.multiprocessing.start_processes(
        _ask, (f"file://{file}",), nprocs=2, start_method="fork"
    )


def _ask(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2
    )
    agree: Agree = agreement_of(None)
    for event in Event:
        agree(event)
    with pytest.raises(RanksDiffer, match="DONE on one, HEAD on another"):
        agree(Event.HEAD if rank else Event.DONE)
    torch.distributed.destroy_process_group()
