"""Requests whose answers must have a form: their automata, and what they may ask.

SGLang's grammar manager keeps the requests that wait for a grammar, compiles in its
threads, and ends aborted ones. It keeps every form that it has compiled: clients with
ever new schemas would fill the memory. The backend here gives it automata, and keeps
those that were asked for last.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import Any

from sglang.srt.constrained.base_grammar_backend import (
    BaseGrammarBackend,
    BaseGrammarObject,
    InvalidGrammarObject,
)
from sglang.srt.managers.schedule_batch import Req

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import prepare
from sglang_dllm.decoding.structure.structure import Structure
from sglang_dllm.errors import RequestError
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.forms import (
    Form,
    compile_form,
    native_form,
    vocabulary_of,
)
from sglang_dllm.grammar.token_automaton import Vocabulary
from sglang_dllm.models.facts import ModelFacts

MAX_KEPT_BYTES = 1 << 29
"""A scheduler keeps forms of so many bytes. One takes some MB, or 200 MB at worst."""

_KEY_BYTES = 1024
"""More than a form that is wrong takes beside its text."""

Key = tuple[str, str]


class KeptForms:
    """The compiled forms that were asked for last, by SGLang's key: kind and text.

    All tensor-parallel ranks keep the same ones: they get the same requests in the same
    order, and an automaton has one size.
    """

    def __init__(self, most: int = MAX_KEPT_BYTES) -> None:
        """
        Args:
            most: bytes.
        """
        self._most, self._num_bytes = most, 0
        # The first one is the one for which nobody has asked longest.
        self._forms: dict[Key, tuple[BaseGrammarObject, int]] = {}

    def __len__(self) -> int:
        return len(self._forms)

    def get(self, key: Key) -> BaseGrammarObject | None:
        """A form, which is now the last one asked for; None if it is not kept."""
        if key not in self._forms:
            return None
        found = self._forms[key] = self._forms.pop(key)
        return found[0]

    def __setitem__(self, key: Key, grammar: Any) -> None:
        self._drop(key)
        size = _KEY_BYTES + len(key[1].encode())
        if isinstance(grammar, AutomatonGrammar):
            size += grammar.num_bytes
        self._forms[key] = grammar, size
        self._num_bytes += size
        while self._num_bytes > self._most:
            self._drop(next(iter(self._forms)))

    def _drop(self, key: Key) -> None:
        _, size = self._forms.pop(key, (None, 0))
        self._num_bytes -= size

    def clear(self) -> None:
        """Keep nothing (``/flush_cache``)."""
        self._forms.clear()
        self._num_bytes = 0


class AutomatonGrammar(BaseGrammarObject):
    """A form as SGLang's grammar manager keeps it. Requests share the automaton."""

    def __init__(self, automaton: TokenAutomaton) -> None:
        super().__init__()
        self.automaton = automaton
        # Here, in a thread: it makes the arcs, which the scheduler would wait for.
        self.num_bytes = automaton.num_bytes

    def copy(self) -> AutomatonGrammar:
        return self


class AutomatonBackend(BaseGrammarBackend):
    """Compiles forms to automata over the tokens of the served model."""

    def __init__(self, tokenizer: Any, facts: ModelFacts) -> None:
        super().__init__()
        self.cache: Any = KeptForms()
        self._tokenizer, self._facts, self._lock = tokenizer, facts, Lock()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        facts = self._facts
        return vocabulary_of(
            self._tokenizer, facts.eos_ids, facts.vocab_size, never=(facts.mask_id,)
        )

    def _compiled(self, form: Form) -> BaseGrammarObject:
        with self._lock:
            vocabulary = self._vocabulary
        try:
            automaton = compile_form(form, vocabulary)
        except FormError as error:
            return InvalidGrammarObject(str(error))
        prepare(automaton)
        return AutomatonGrammar(automaton)

    def dispatch_json(self, key_string: str) -> BaseGrammarObject:
        return self._compiled(native_form("json_schema", key_string))

    def dispatch_regex(self, key_string: str) -> BaseGrammarObject:
        return self._compiled(Form("regex", key_string))

    def dispatch_ebnf(self, key_string: str) -> BaseGrammarObject:
        return self._compiled(Form("ebnf", key_string))

    def dispatch_structural_tag(self, key_string: str) -> BaseGrammarObject:
        return self._compiled(Form("structural_tag", key_string))


def use_automata(scheduler: Any, facts: ModelFacts) -> None:
    """Let a scheduler's grammar manager compile automata.

    A server without a tokenizer has no backend, and its manager refuses forms.
    """
    grammars = scheduler.grammar_manager
    if grammars.grammar_backend is not None:
        grammars.grammar_backend = AutomatonBackend(scheduler.tokenizer, facts)


def take_compiled(scheduler: Any) -> None:
    """Move the requests whose automaton is there, or wrong, to the waiting queue."""
    grammars = scheduler.grammar_manager
    if grammars.has_waiting_grammars():
        for req in grammars.get_ready_grammar_requests():
            scheduler._add_request_to_queue(req)


def give_form(req: Req, canvas: Canvas) -> None:
    """Give a canvas the form that its request asks for.

    ``serving.forms`` has refused what does not go together with a form.

    Raises:
        RequestError: the canvas is too short for the form.
    """
    if req.grammar is None:
        return
    automaton, num_tokens = req.grammar.automaton, req.sampling_params.max_new_tokens
    if automaton.min_tokens > num_tokens:
        raise RequestError(
            f"max_new_tokens={num_tokens} is too short: a valid answer needs at least "
            f"{automaton.min_tokens} tokens"
        )
    canvas.require(Structure(automaton))
