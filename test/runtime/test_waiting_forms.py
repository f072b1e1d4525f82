"""Requests that wait for the automaton of their form, in SGLang's grammar manager."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.toy_engine import FACTS
from sglang_dllm.runtime.forms import AutomatonBackend


class SlowBackend(AutomatonBackend):
    """Ends a compilation when the test says so; no form is right."""

    def __init__(self) -> None:
        super().__init__(None, FACTS)
        self.begun, self.may_end = Event(), Event()

    def _compiled(self, form: Any) -> Any:
        self.begun.set()
        assert self.may_end.wait(30)
        return InvalidGrammarObject(f"no {form.text}")


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    ranks = SimpleNamespace(tp_rank=0)
    monkeypatch.setattr(
        "sglang.srt.managers.schedule_batch.get_parallel", lambda: ranks
    )
    found: Any = FakeScheduler()
    manager: Any = object.__new__(GrammarManager)
    manager.grammar_queue, manager.grammar_backend = [], SlowBackend()
    manager._enable_strict_thinking = False
    manager.grammar_sync_size, manager.pp_rank, manager.pp_size = 1, 0, 1
    manager.SGLANG_GRAMMAR_POLL_INTERVAL = 0.001
    manager.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS = 10_000
    found.grammar_manager = manager
    found._add_request_to_queue = lambda req: found.waiting_queue.append(req)
    return found


def ask(scheduler: Any, rid: str, regex: str) -> Any:
    """A request as SGLang's scheduler takes it."""
    req = scheduler.queue(rid, regex=regex, ignore_eos=False)
    scheduler.waiting_queue.remove(req)
    assert scheduler.grammar_manager.process_req_with_grammar(req)
    return req


def test_an_abort_does_not_wait_for_the_automaton(scheduler: Any) -> None:
    """The request leaves, no slot stays, and others go on meanwhile."""
    free = scheduler.free_slots
    manager = scheduler.grammar_manager
    aborted, waits = ask(scheduler, "aborted", "a+"), ask(scheduler, "waits", "b+")
    plain = scheduler.queue("plain")
    assert manager.grammar_backend.begun.wait(30)
    manager.abort_requests(SimpleNamespace(abort_all=False, rid="aborted"))
    for _ in range(20):
        scheduler.loop()
    assert not manager.grammar_backend.may_end.is_set()
    assert end_of(aborted)[0] == "abort"
    assert len(plain.output_ids) == 8 and plain.finished()
    assert manager.grammar_queue == [waits] and not waits.finished()
    manager.grammar_backend.may_end.set()
    while manager.grammar_queue:
        scheduler.loop()
    scheduler.loop_to_end()
    kind, _, message = end_of(waits)
    assert kind == "abort" and "no b+" in message
    assert scheduler.free_slots == free
