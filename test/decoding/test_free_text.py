"""Canvases whose text is free until a trigger: equal to plain ones, and valid."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from helpers.toy_model import (
    EOS,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    canvas_of,
    run_canvases,
)
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.structure import Structure
from sglang_dllm.grammar.forms import Form, compile_form
from sglang_dllm.grammar.token_automaton import Vocabulary

SPECIAL, A, X = 8, 0, 9
TEXTS = [b"a", b"b", b"ab", None, b"c", None, b"ba", b"\n", None, b"x", b"abc"]
LENGTHS = (9, 16, 12)


def automaton_of(trigger: str, structures: dict[str, str], **more: Any) -> Any:
    tags = [
        {
            **{"type": "tag", "begin": begin, "end": ""},
            "content": {"type": "regex", "pattern": pattern},
        }
        for begin, pattern in structures.items()
    ]
    tag = {"type": "triggered_tags", "triggers": [trigger], "tags": tags, **more}
    form = Form("structural_tag", json.dumps({"format": tag}))
    silent = {SPECIAL: b"[x]"}
    return compile_form(form, Vocabulary(TEXTS, [EOS], VOCAB, silent, [MASK]))


NEVER = automaton_of("zz", {"zz": "a"})
STRUCTURES = {"a": "c|x", "ab": "\n"}
OFTEN = automaton_of("a", STRUCTURES)
ONCE = automaton_of("a", STRUCTURES, stop_after_first=True)
VALID = "a(c|x|b\n)"


def is_kept(text: str, *, goes_on: bool) -> bool:
    at = 0
    while (begin := text.find("a", at)) >= 0:
        found = re.compile(VALID).match(text, begin)
        if found is None:
            return False
        at = found.end()
        if not goes_on:
            return at == len(text)
    return True


def text_of(canvas: Any) -> str:
    answer = canvas.ids[canvas.prompt_len :].tolist()
    end = answer.index(EOS) if EOS in answer else len(answer)
    return b"".join(TEXTS[token] or b"" for token in answer[:end]).decode()


def formed(
    family: str,
    request: Request,
    automaton: TokenAutomaton | None,
    *,
    ends_at_eos: bool = True,
) -> Any:
    made = canvas_of(family, request, ends_at_eos=ends_at_eos)
    if automaton is not None:
        made[1].require(Structure(automaton))
    return made


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_text_without_a_trigger_is_that_of_a_plain_request(
    family: str, algorithm: str
) -> None:
    """Tokens and forwards, special tokens among them. Coarse logits have equal ones.

    The model writes no EOS in front of other tokens, which no answer of a form has.
    """
    requests = [
        Request(
            ToyModel(seed, eos_bias=-100, coarse=seed > 1),
            (1, 2),
            length,
            algorithm,
            {},
        )
        for seed in range(4)
        for length in LENGTHS
    ]
    for ends_at_eos in (False, True):
        plain, canvases = (
            run_canvases(
                family,
                [
                    formed(family, request, automaton, ends_at_eos=ends_at_eos)
                    for request in requests
                ],
                [],
            )
            for automaton in (None, NEVER)
        )
        for one, other in zip(canvases, plain, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.num_forwards == other.num_forwards


class Caller(ToyModel):
    """It would begin with a trigger, and has no idea of what has to follow."""

    def __init__(self, probability: float) -> None:
        super().__init__(0)
        self.logits = torch.zeros(VOCAB)
        self.logits[X] = 4
        self.first = self.logits.clone()
        self.first[A] = -torch.inf
        self.first[A] = self.first.logsumexp(0) + torch.tensor(probability).logit()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.logits.repeat(len(ids), 1)
        found[len(PROMPT)] = self.first
        return found


PROMPT = (1, 2)


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_a_model_that_is_sure_of_a_trigger_begins_a_structure(algorithm: str) -> None:
    """The text ``x`` is far more probable than the whole structure."""
    automaton = automaton_of("a", {"a": "[bc]{6}"})
    texts = []
    for probability in (0.6, 0.3):
        request = Request(Caller(probability), PROMPT, 12, algorithm, {})
        made = formed("llada", request, automaton)
        (canvas,) = run_canvases("llada", [made], [])
        texts.append(text_of(canvas))
    assert re.fullmatch("a[bc]{6}x{5}", texts[0]), texts
    assert texts[1] == 12 * "x"


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_algorithm_completes_what_a_trigger_begins(
    family: str, algorithm: str, temperature: float
) -> None:
    sampling = SamplingOptions(temperature, seed=5)
    found = []
    for seed in range(4):
        for automaton in (OFTEN, ONCE):
            model = ToyModel(seed, eos_bias=-6, coarse=True)
            made = [
                formed(
                    family,
                    Request(model, (1, 2), length, algorithm, {}, sampling),
                    automaton,
                )
                for length in LENGTHS
            ]
            for canvas in run_canvases(family, made, []):
                text = text_of(canvas)
                assert canvas.failure is None
                assert is_kept(text, goes_on=automaton is OFTEN), text
                found.append(text)
    assert any("a" in text for text in found)
