"""Fields that ban or prefer tokens against the plain reference, alone and in crowds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from decoding.test_algorithms import ALGORITHMS, check, requests
from hypothesis import given
from hypothesis import strategies as st

from helpers.toy_model import (
    EOS,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    answer,
    decode,
)
from sglang_dllm.decoding.token_edits import TokenEdits

SAFE = 9
TOKENS = [token for token in range(VOCAB) if token not in (MASK, SAFE)]
token = st.sampled_from(TOKENS)
text = token.filter(lambda one: one != EOS)
EDITS = st.builds(
    TokenEdits,
    bias=st.dictionaries(
        token, st.sampled_from([-100.0, -math.inf, -3.0, 2.5, 9.0])
    ).map(lambda bias: tuple(bias.items())),
    allowed=st.none() | st.sets(token).map(lambda some: (*sorted(some), SAFE)),
    min_tokens=st.sampled_from([0, 0, 3, 7]),
    ends=st.sampled_from([(EOS,), (EOS, 8)]),
    words=st.lists(st.lists(text, min_size=2, max_size=3).map(tuple), max_size=20).map(
        lambda words: tuple(set(words))
    ),
)


@st.composite
def edited_requests(
    draw: st.DrawFn, family: str, algorithm: str | None = None
) -> Request:
    request = draw(requests(family, algorithm))
    edits = draw(EDITS)
    least = min(edits.min_tokens, request.length)
    return replace(request, edits=replace(edits, min_tokens=least))


def has_word(canvas: Any, words: tuple[tuple[int, ...], ...], given: Any) -> bool:
    """True if a forward wrote a token of a word that is in the answer up to its end."""
    ids = answer(canvas)
    ends = [i for i, one in enumerate(ids) if one == EOS and i >= canvas.ends_from]
    ids = ids[: ends[0] + 1] if ends else ids
    return any(
        tuple(ids[at : at + len(word)]) == word
        and any(given is None or given[i] is None for i in range(at, at + len(word)))
        for word in words
        for at in range(len(ids))
    )


def check_fields(request: Request, canvas: Any) -> None:
    edits, given, ids = request.edits, request.template, answer(canvas)
    if edits is None:
        return
    assert not has_word(canvas, edits.words, given)
    for i, one in enumerate(ids):
        is_free = given is None or given[i] is None
        if is_free and i < edits.min_tokens:
            assert one not in edits.ends
        if is_free and edits.allowed is not None and EOS not in ids:
            assert one in edits.allowed


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_equals_its_reference(family: str, algorithm: str, data: st.DataObject) -> None:
    request = data.draw(edited_requests(family, algorithm))
    (canvas,) = decode(family, [request])
    check(family, request, canvas)
    check_fields(request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
@given(data=st.data())
def test_a_crowd_gives_each_what_it_gets_alone(
    family: str, data: st.DataObject
) -> None:
    """Requests with fields and without them, of many algorithms."""
    one = edited_requests(family) | requests(family)
    crowd = data.draw(st.lists(one, min_size=2, max_size=7))
    for request, canvas in zip(crowd, decode(family, crowd), strict=True):
        check(family, request, canvas)
        check_fields(request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_dreams_last_step_is_its_own_in_a_crowd(family: str) -> None:
    """A word holds masks back there, and another request has more steps."""
    model = ToyModel(0, eos_bias=-50)
    word = TokenEdits((), None, 0, (EOS,), ((0, 0),))
    one = Request(model, (), 16, "Dream", {"steps": 1}, edits=word)
    longer = Request(model, (), 2, "Dream", {})
    for request, canvas in zip(
        (longer, one), decode(family, [longer, one]), strict=True
    ):
        check(family, request, canvas)
