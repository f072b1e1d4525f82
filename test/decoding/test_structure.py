"""Structured canvases: the programme against all strings, and every algorithm."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.toy_model import (
    EOS,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    decode,
    facts_of,
    held,
    resolve,
    run_canvases,
)
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import Part, Programme
from sglang_dllm.decoding.structure.structure import Structure
from sglang_dllm.grammar.forms import Form, read_form
from sglang_dllm.grammar.token_automaton import Vocabulary, token_automaton

TEXTS = [b"a", b"b", b"ab", None, b"c", None, b"ba", b"\n", b"cc", b"x", b"abc"]
FORMS = ("(ab)*c", "a+b?x", "(a|bc){1,3}", "c|(ab|x)+", "abcabc|x")
LENGTHS = (7, 4, 6, 5, 6)


def automaton_of(regex: str) -> TokenAutomaton:
    return token_automaton(
        read_form(Form("regex", regex)), Vocabulary(TEXTS, [EOS], VOCAB)
    )


AUTOMATA = {regex: automaton_of(regex) for regex in FORMS}


def is_valid(automaton: TokenAutomaton, tokens: tuple[int, ...]) -> bool:
    """The tokens, then EOS alone."""
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    is_padded = all(token == EOS for token in tokens[end:])
    return is_padded and automaton.takes(list(tokens[:end]))


def class_scores(
    automaton: TokenAutomaton, scores: np.ndarray, fixed: list[int]
) -> torch.Tensor:
    found = np.full((len(scores), automaton.num_classes + 1), -np.inf)
    for at, row in enumerate(scores):
        for token, score in enumerate(row):
            if fixed[at] in (-1, token):
                of = automaton.token_class[token]
                found[at, of] = max(found[at, of], score)
    return torch.from_numpy(found)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.lists(st.sampled_from([-1, -1, -1, 0, 1, 2, EOS]), min_size=4, max_size=4),
)
def test_the_programme_finds_the_best_of_all_strings(
    regex: str, length: int, seed: int, fixed: list[int]
) -> None:
    automaton, fixed = AUTOMATA[regex], fixed[:length]
    scores = np.random.default_rng(seed).normal(size=(length, VOCAB))
    strings = [
        tokens
        for tokens in itertools.product(range(VOCAB), repeat=length)
        if all(f in (-1, t) for f, t in zip(fixed, tokens, strict=True))
        and is_valid(automaton, tokens)
    ]
    programme = Programme(
        [Part(automaton, automaton.start, length)], torch.device("cpu")
    )
    ids = torch.tensor([[MASK if token < 0 else token for token in fixed]])
    is_open = programme.open_classes(ids, torch.tensor([fixed]) < 0)
    possible = programme.possible(is_open)
    for at in range(length):
        of = automaton.token_class[[tokens[at] for tokens in strings]]
        assert set(of) == set(possible[at].nonzero()[:, 0].tolist())
    if not strings:
        return
    best = max(
        strings, key=lambda tokens: sum(scores[at, t] for at, t in enumerate(tokens))
    )
    path = programme.best_classes(class_scores(automaton, scores, fixed))
    assert path[0].tolist() == automaton.token_class[list(best)].tolist()


def structured(family: str, request: Request, regex: str) -> Any:
    decoding = resolve(family, request)
    canvas = decoding.new_canvas(
        request.prompt,
        request.length,
        facts_of(family),
        sampling=request.sampling,
        ends_at_eos=not request.ignore_eos,
    )
    canvas.structure = Structure(AUTOMATA[regex])
    return request.model, canvas, decoding


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
