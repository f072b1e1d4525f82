"""The forms that a request may ask for, and their automata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Literal

import xgrammar

from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.grammar import json_text
from sglang_dllm.grammar.byte_automaton import ByteAutomaton, byte_automaton
from sglang_dllm.grammar.ebnf import Rule, Rules, read_rules
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.json_schema import read_schema
from sglang_dllm.grammar.regex import read_regex
from sglang_dllm.grammar.tagged import read_tag
from sglang_dllm.grammar.token_automaton import Vocabulary, token_automaton
from sglang_dllm.grammar.work import Work

_ONE_AT_A_TIME = Lock()

Kind = Literal["json_schema", "json_object", "regex", "ebnf", "structural_tag"]

NATIVE: tuple[Kind, ...] = ("json_schema", "regex", "ebnf", "structural_tag")
"""The kinds for which SGLang's sampling parameters have a field."""

_ANY_OBJECT = ('{"type": "object"}', '{"type":"object"}', "$$ANY$$")

MAX_TEXT_LENGTH = 65_536
"""Characters of the text of a form."""


@dataclass(frozen=True)
class Form:
    """
    Attributes:
        text: the JSON of a schema or of a structural tag, the expression, or the EBNF;
            empty for any JSON object.
    """

    kind: Kind
    text: str = ""


# An automaton may take 20 MB.
@lru_cache(maxsize=16)
def read_form(form: Form) -> ByteAutomaton:
    """The automaton over bytes.

    Takes about a second at most: a form that needs more work is refused.

    Raises:
        FormError: the form is wrong, too large, or not served.
    """
    if len(form.text) > MAX_TEXT_LENGTH:
        raise FormError(f"it has more than {MAX_TEXT_LENGTH} characters")
    work = Work()
    try:
        return byte_automaton(_rules(form, work), work)
    except RecursionError:
        raise FormError("it is nested too deeply") from None


def native_form(kind: Kind, text: str) -> Form:
    """The form of a sampling parameter of SGLang, under the name of the parameter.

    SGLang has no parameter for any JSON object, but words for it.
    """
    is_any = kind == "json_schema" and text in _ANY_OBJECT
    return Form("json_object") if is_any else Form(kind, text)


def compile_form(form: Form, vocabulary: Vocabulary) -> TokenAutomaton:
    """The automaton over the tokens of a vocabulary.

    Takes about two seconds at most. One form is compiled at a time: threads that
    compile share an interpreter with the scheduler, which would wait for all of them.

    Raises:
        FormError: as ``read_form``; or it is too large, or no tokens have the form.
    """
    with _ONE_AT_A_TIME:
        return token_automaton(read_form(form), vocabulary)


def vocabulary_of(
    tokenizer: Any, eos_ids: Iterable[int], size: int, never: Iterable[int] = ()
) -> Vocabulary:
    """The texts of a tokenizer's tokens. Special tokens have none.

    An added token that is not special is text, such as Qwen's ``<tool_call>``.

    Args:
        tokenizer: of transformers.
        size: of the model's vocabulary.
        never: tokens that no answer has, such as the mask token.
    """
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    tokens: list[bytes | None] = list(info.decoded_vocab)
    gone = {*never, *eos_ids}
    special = {*info.special_token_ids, *tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {token for token, found in added.items() if found.special}
    silent = {}
    for token in range(size):
        is_text = token < len(tokens) and tokens[token]
        if token in special or token in gone or not is_text:
            shown = tokenizer.convert_ids_to_tokens(token) if is_text else None
            silent[token] = str(shown or "").encode()
            tokens[token : token + 1] = [None]
    silent = {token: shown for token, shown in silent.items() if token not in gone}
    return Vocabulary(tokens, list(eos_ids), size, silent, never)


def _rules(form: Form, work: Work) -> Rules:
    match form.kind:
        case "json_schema":
            return read_schema(form.text, work)
        case "json_object":
            return {**json_text.ANY_RULES, "root": Rule("any object")}
        case "regex":
            return {"root": read_regex(form.text, work)}
        case "ebnf":
            return _ebnf(form.text)
        case "structural_tag":
            return read_tag(form.text, work)


def _ebnf(text: str) -> Rules:
    try:
        grammar = xgrammar.Grammar.from_ebnf(text)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise FormError(f"it is no EBNF: {reason}") from None
    return read_rules(str(grammar))
