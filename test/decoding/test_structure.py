"""Structured canvases: the programme against all strings, and every algorithm."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from helpers.toy_model import (
    EOS,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    canvas_of,
    decode,
    facts_of,
    held,
    run_canvases,
)
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.structure import loops
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import Programme, Strip, prepare
from sglang_dllm.decoding.structure.structure import Structure
from sglang_dllm.grammar.forms import Form, Kind, read_form
from sglang_dllm.grammar.token_automaton import Vocabulary, token_automaton

TEXTS = [b"a", b"b", b"ab", None, b"c", None, b"ba", b"\n", b"cc", b"x", b"abc"]
FORMS = ("(ab)*c", "a+b?x", "(a|bc){1,3}", "c|(ab|x)+", "abcabc|x")
LENGTHS = (7, 4, 6, 5, 6)


NESTED = 'root ::= "x" | "a" root "c" | "b" root "ba"'
"""Tokens of several characters reach over the ends of what is inside."""


def automaton_of(text: str, kind: Kind = "regex") -> TokenAutomaton:
    form = read_form(Form(kind, text))
    return token_automaton(form, Vocabulary(TEXTS, [EOS], VOCAB))


AUTOMATA = {regex: automaton_of(regex) for regex in FORMS}
AUTOMATA[NESTED] = automaton_of(NESTED, "ebnf")


def is_valid(automaton: TokenAutomaton, tokens: tuple[int, ...]) -> bool:
    """The tokens, then EOS alone."""
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    is_padded = all(token == EOS for token in tokens[end:])
    return is_padded and automaton.takes(list(tokens[:end]))


def valid_strings(
    automaton: TokenAutomaton, fixed: list[int], behind: int
) -> list[tuple[int, ...]]:
    """The beginnings of all valid answers that have some tokens; -1 for any."""
    length = len(fixed)
    found = (
        tokens
        for tokens in itertools.product(range(VOCAB), repeat=length + behind)
        if all(f in (-1, t) for f, t in zip(fixed, tokens, strict=False))
        and is_valid(automaton, tokens)
    )
    return sorted({tokens[:length] for tokens in found})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(AUTOMATA)),
            st.integers(1, 3),
            st.integers(0, 1),
            st.lists(st.sampled_from([-1, -1, -1, 0, 1, 2, EOS]), min_size=3),
            st.lists(st.sampled_from([-1, 0, 1, 2, EOS]), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 1000),
)
def test_the_programme_finds_the_best_of_all_strings(
    made: list[tuple[str, int, int, list[int], list[int]]], seed: int
) -> None:
    """Several canvases together, with tokens in their middle, and with an open end.

    Sure tokens are kept first, from left to right.
    """
    rng = np.random.default_rng(seed)
    cases = [
        (AUTOMATA[form], fixed[:num], more, sure)
        for form, num, more, fixed, sure in made
    ]
    strips = [
        Strip(
            automaton,
            automaton.start,
            np.array([-1 if t < 0 else automaton.token_class[t] for t in fixed]),
            behind,
        )
        for automaton, fixed, behind, _ in cases
    ]
    programme = Programme(strips)
    by_token = rng.normal(size=(programme.num_rows, VOCAB))
    scores = np.full((programme.num_rows, programme.num_classes), -np.inf)
    sure_classes = np.full(programme.num_rows, -1)
    for rows, (automaton, _, _, sure) in zip(programme.rows, cases, strict=True):
        for at, row in enumerate(rows):
            if row >= 0:
                np.maximum.at(scores[row], automaton.token_class, by_token[row])
                if sure[at] >= 0:
                    sure_classes[row] = automaton.token_class[sure[at]]
    best_classes = programme.best_classes(scores, sure_classes)
    for rows, (automaton, fixed, behind, sure) in zip(
        programme.rows, cases, strict=True
    ):
        strings = valid_strings(automaton, fixed, behind)
        masks = [at for at, token in enumerate(fixed) if token < 0]
        for at in masks:
            of = {int(automaton.token_class[tokens[at]]) for tokens in strings}
            row = rows[at]
            assert of == set(programme.possible[row].nonzero()[0].tolist())
            tokens_at = {tokens[at] for tokens in strings}
            assert programme.certain[row] == (len(tokens_at) == 1)
        found = best_classes[rows[masks]].tolist()
        for at in masks:
            wanted = -1 if sure[at] < 0 else automaton.token_class[sure[at]]
            with_it = [t for t in strings if automaton.token_class[t[at]] == wanted]
            strings = with_it or strings
        if strings:
            best = max(
                strings,
                key=lambda tokens: sum(by_token[rows[at], tokens[at]] for at in masks),
            )
            assert found == [automaton.token_class[best[at]] for at in masks]
        else:
            assert found == [-1] * len(masks)


def test_the_loops_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step. A folder that nobody may write costs the cache alone."""
    prepare(AUTOMATA[NESTED])
    request = Request(ToyModel(1), (1,), 7, sorted(algorithms())[0], {})
    run_canvases("llada", [structured("llada", request, FORMS[0])], [])
    assert len(loops.find_possible.signatures) == 1
    assert len(loops.find_best.signatures) == 1
    assert len(loops.keep_sure.signatures) == 1
    asked = []

    def without_folder(cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function")
        return njit(**options)

    monkeypatch.setattr(loops, "njit", without_folder)
    assert loops._compiled(lambda number: number + 1)(1) == 2
    assert asked == [True, False]


def structured(family: str, request: Request, regex: str) -> Any:
    made = canvas_of(family, request, ends_at_eos=not request.ignore_eos)
    made[1].structure = Structure(AUTOMATA[regex])
    return made


SETTINGS: tuple[tuple[dict[str, Any], float], ...] = (
    ({}, 0.0),
    ({"cache": "dual", "block_size": 4}, 0.8),
    ({"max_forwards": 2}, 0.8),
)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
@pytest.mark.parametrize(("options", "temperature"), SETTINGS, ids=str)
def test_every_algorithm_gives_valid_answers(
    family: str, algorithm: str, temperature: float, options: dict[str, Any]
) -> None:
    if "cache" in options and options["cache"] not in algorithms()[algorithm].caches:
        pytest.skip("the algorithm has no such cache")
    model = ToyModel(3, coarse=True)
    sampling = SamplingOptions(temperature, seed=11)
    requests = [
        Request(model, (1, 2), length, algorithm, dict(options), sampling)
        for length in LENGTHS
    ]
    free = Request(model, (2, 1), 6, algorithm, dict(options), sampling)
    made = [structured(family, one, r) for one, r in zip(requests, FORMS, strict=True)]
    *canvases, other = run_canvases(family, made, [free])
    for canvas, regex in zip(canvases, FORMS, strict=True):
        answer = canvas.ids[canvas.prompt_len :]
        if not canvas.masked.any():
            assert is_valid(AUTOMATA[regex], tuple(answer.tolist()))
        assert canvas.structure is not None and canvas.structure.is_kept(canvas)
    (alone,) = decode(family, [free])
    assert other.ids.tolist() == alone.ids.tolist()
    # A canvas gets the same answer alone.
    (again,) = run_canvases(family, [structured(family, requests[2], FORMS[2])], [])
    assert again.ids.tolist() == canvases[2].ids.tolist()


def test_certain_tokens_cost_no_forward_of_their_own() -> None:
    """The second token follows from the first, and EOS from both."""
    form = automaton_of("xxxxx")
    request = Request(ToyModel(1), (1,), 8, sorted(algorithms())[0], {})
    model, canvas, decoding = structured("llada", request, FORMS[0])
    canvas.structure = Structure(form)
    run_canvases("llada", [(model, canvas, decoding)], [])
    assert canvas.ids[1:6].tolist() == [9] * 5
    assert canvas.num_forwards == 1


def test_tokens_that_follow_from_the_form_are_there_before_the_first_forward() -> None:
    """The beginning of the answer, and all of one that leaves no choice."""
    request = Request(ToyModel(1), (1, 2), 6, sorted(algorithms())[0], {})
    _, canvas, decoding = structured("llada", request, FORMS[0])
    canvas.require(Structure(automaton_of("xx(a|b)")))
    assert canvas.ids[2:].tolist() == [9, 9, MASK, EOS, EOS, EOS]
    run_canvases("llada", [(request.model, canvas, decoding)], [])
    assert canvas.ids[4] in (0, 1) and canvas.num_forwards == 1
    _, canvas, decoding = structured("llada", request, FORMS[0])
    canvas.require(Structure(automaton_of("xxxxx")))
    run_canvases("llada", [(request.model, canvas, decoding)], [])
    assert canvas.ids[2:].tolist() == [9] * 5 + [EOS]
    assert canvas.num_forwards == 0


def test_states_behind_a_prefix_follow_what_became_of_it() -> None:
    """Tokens may be taken back, and others may come in their place."""
    request = Request(ToyModel(1), (1,), 5, sorted(algorithms())[0], {})
    _, canvas, _ = structured("llada", request, "(a|bc){1,3}")
    form = canvas.structure
    for tokens in ([0, 0, 1], [0, 0, 1, 4], [0], [0, 1, 4], [1, 0], []):
        canvas.ids[1:], canvas.masked[1:] = MASK, True
        canvas.ids[1 : 1 + len(tokens)] = tokens
        canvas.masked[1 : 1 + len(tokens)] = False
        canvas.span_end = 5
        place, strip = form.strip(canvas)
        assert place == len(tokens)
        assert strip.state == form.automaton.follow(form.automaton.start, tokens)
        assert len(strip.classes) == 5 - len(tokens) and strip.behind == 0


def test_a_strip_ends_where_nothing_is_decided_any_more() -> None:
    """Behind the first EOS of a committed end; at the end in the last forward."""
    request = Request(ToyModel(1), (1,), 6, sorted(algorithms())[0], {})
    _, canvas, _ = structured("llada", request, "(ab)*c")
    form, canvas.span_end = canvas.structure, 2
    place, strip = form.strip(canvas)
    assert (place, strip.classes.tolist(), strip.behind) == (0, [-1, -1], 4)
    canvas.max_forwards = 1
    place, strip = form.strip(canvas)
    assert (place, len(strip.classes), strip.behind) == (0, 6, 0)
    canvas.max_forwards = None
    canvas.ids[4:], canvas.masked[4:] = EOS, False
    place, strip = form.strip(canvas)
    assert strip.classes.tolist() == [-1, -1, -1, form.automaton.eos_class]
    assert strip.behind == 2
    programme = Programme([strip])
    ends = programme.possible[2].nonzero()[0].tolist()
    assert form.automaton.token_class[0] not in ends  # a cannot be the last token
    canvas.ids[3], canvas.masked[3] = 4, False
    canvas.ids[4:], canvas.masked[4:] = MASK, True
    place, strip = form.strip(canvas)
    assert strip.classes.tolist() == [-1, -1, form.automaton.token_class[4]]


def test_an_impossible_form_ends_with_an_error() -> None:
    request = Request(ToyModel(1), (1,), 3, sorted(algorithms())[0], {})
    _, canvas, decoding = structured("llada", request, "abcabc|x")
    canvas.structure = Structure(automaton_of("xxxxx"))
    denoiser = Denoiser(facts_of("llada"))
    denoiser.join(denoiser.prepare(canvas, decoding))
    denoiser.sync()
    while not canvas.done and not canvas.failure:
        num = len(denoiser.pack().logits_indices)
        denoiser.commit(held(torch.zeros(num, VOCAB)))
        denoiser.sync()
    assert canvas.failure is not None and "form" in canvas.failure
