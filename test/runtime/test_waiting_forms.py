"""Automata in SGLang's grammar manager: requests that wait for them, those it keeps."""

from __future__ import annotations

import gc
import json
import weakref
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager
from transformers import AutoTokenizer

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.toy_engine import FACTS
from sglang_dllm.decoding.structure.structure import Structure
from sglang_dllm.demo import demo_path
from sglang_dllm.runtime.forms import AutomatonBackend, AutomatonGrammar, KeptForms


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


class Asked:
    """A backend with the demo's tokenizer, asked as the grammar manager asks it."""

    def __init__(self, most: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(demo_path())
        self.backend = AutomatonBackend(tokenizer, replace(FACTS, vocab_size=384))
        self.backend.cache = KeptForms(most)
        self.made = weakref.WeakSet[Any]()
        self.num_compiled = 0

    def of(self, schema: Any) -> Any:
        """The grammar of a schema."""
        key = ("json", json.dumps(schema))
        value, is_kept = self.backend.get_cached_or_future_value(key, False)
        assert is_kept is not isinstance(value, Future)
        if isinstance(value, Future):
            self.num_compiled += 1
            value = value.result()
            self.backend.set_cache(key, value.copy())
        if isinstance(value, AutomatonGrammar):
            self.made.add(value.automaton)
        return value

    @property
    def num_kept(self) -> int:
        return len(self.backend.cache)


def test_a_thousand_schemas_leave_a_bounded_number() -> None:
    """The last ones are kept. No other part of the server holds one either."""
    most = 400_000
    asked = Asked(most)
    canvas: Any = SimpleNamespace(
        answer_len=8, prompt_len=0, length=None, eos_ids=FACTS.eos_ids
    )
    favourite = {"const": "often"}
    size = asked.of(favourite).num_bytes
    num_favourites = 0
    for number in range(1000):
        automaton = asked.of({"const": number}).automaton
        # Tokens that all answers have are found once, and kept elsewhere.
        Structure(automaton).known_tokens(canvas)
        if number % 10 == 0:
            asked.of(favourite)
            num_favourites += 1
    del automaton
    gc.collect()
    assert num_favourites == 100 and asked.num_compiled == 1001
    assert 10 < asked.num_kept < most / size
    # The last future of SGLang's threads may hold one more.
    assert len(asked.made) <= asked.num_kept + 1
    for number in range(1000 - asked.num_kept + 1, 1000):
        asked.of({"const": number})
    assert asked.num_compiled == 1001
    asked.of({"const": 0})
    assert asked.num_compiled == 1002
    asked.backend.reset()
    assert asked.num_kept == 0


def test_wrong_forms_are_kept_up_to_the_bound_too() -> None:
    asked = Asked(100_000)
    for number in range(200):
        found = asked.of({"not": {"const": number}})
        assert isinstance(found, InvalidGrammarObject)
    assert 10 < asked.num_kept <= 100


def test_a_form_beyond_the_bound_is_served_and_not_kept() -> None:
    kept = KeptForms(5000)
    kept[("json", "small")] = InvalidGrammarObject("a")
    kept[("json", "x" * 6000)] = InvalidGrammarObject("b")
    assert len(kept) == 0
    for _ in range(9):
        kept[("json", "again")] = InvalidGrammarObject("c")
    kept[("json", "other")] = InvalidGrammarObject("d")
    assert len(kept) == 2


def test_the_size_of_an_automaton_is_that_of_its_arrays() -> None:
    asked = Asked(1 << 20)
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    small, large = asked.of({"const": 1}), asked.of(schema)
    edges = large.automaton.edge_source.nbytes
    assert 4 * edges < large.num_bytes < 16 * edges + large.automaton.token_class.nbytes
    assert small.num_bytes < large.num_bytes
