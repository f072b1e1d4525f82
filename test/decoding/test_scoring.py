"""Every scoring method against its plain reference, alone and beside generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.scores import expected_score
from helpers.scripted_model import JUNK, ScriptedModel, peak
from helpers.toy_model import (
    FAMILY,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    answer,
    decode,
    facts_of,
    run_canvases,
)
from sglang_dllm.config.scoring import Scoring
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.errors import OptionError

METHODS = ("mc", "chain", "confidence", "greedy")


@dataclass(frozen=True)
class Question:
    """One continuation for a toy model."""

    model: ToyModel
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    score: dict[str, Any]
    seed: int = 0

    def made(self, family: str) -> tuple[Canvas, Decoding]:
        scoring = Scoring.of(self.score, self.target, FAMILY[family])
        canvas = scoring.new_canvas(self.prompt, facts_of(family), self.seed)
        return canvas, scoring.decoding

    def expected(self, family: str) -> dict[str, Any]:
        return expected_score(
            self.model.shifted(family),
            list(self.prompt),
            list(self.target),
            MASK,
            self.score,
            self.seed,
        )


def scored(family: str, questions: list[Question], *others: Request) -> list[Canvas]:
    """The canvases of the questions and of requests that generate, in one batch."""
    made = [(question.model, *question.made(family)) for question in questions]
    return run_canvases(family, made, others)


def check(question: Question, canvas: Canvas, family: str) -> None:
    assert canvas.scored is not None and canvas.done
    found, expected = canvas.scored.to_dict(), question.expected(family)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    assert answer(canvas) == list(question.target)
    assert len(canvas.take_committed_prefix()) == 0 and canvas.is_complete


@st.composite
def questions(draw: st.DrawFn) -> Question:
    tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
    method = draw(st.sampled_from(METHODS))
    score: dict[str, Any] = {
        "method": method,
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 0.5, 2.0])),
    }
    if method == "mc":
        score["num_samples"] = draw(st.integers(1, 9))
        score["batch_size"] = draw(st.integers(1, 5))
    return Question(
        ToyModel(draw(st.integers(0, 99)), coarse=draw(st.booleans())),
        tuple(draw(st.lists(tokens, min_size=1, max_size=4))),
        tuple(draw(st.lists(tokens, min_size=1, max_size=7))),
        score,
        draw(st.integers(-(2**40), 2**40)),
    )


@pytest.mark.parametrize("family", FAMILY)
@given(asked=st.lists(questions(), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_scores_are_those_of_the_references_beside_generation(
    family: str, asked: list[Question], seed: int
) -> None:
    other = Request(ToyModel(seed), (1, 2), 9, "LLaDA", {"block_size": 4, "steps": 5})
    canvases = scored(family, asked, other)
    (alone,) = decode(family, [other])
    assert answer(canvases[-1]) == answer(alone)
    for question, canvas in zip(asked, canvases, strict=False):
        check(question, canvas, family)


@pytest.mark.parametrize("family", FAMILY)
def test_a_continuation_that_greedy_decoding_finds(family: str) -> None:
    """The reference finds the tokens; a wrong one at the end is noticed."""
    model, facts = ToyModel(4), facts_of(family)
    ids = [1, 2, 8] + [MASK] * 5
    for _ in range(5):
        logits = model.shifted(family)(torch.tensor(ids)).double()
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1)
        masked = [i for i, token in enumerate(ids) if token == MASK]
        surest = max(masked, key=lambda i: float(p[i].max()))
        ids[surest] = int(logits[surest].argmax())
    right = tuple(ids[3:])
    wrong = (*right[:-1], (right[-1] + 1) % VOCAB)
    asked = [
        Question(model, (1, 2, 8), target, {"method": "greedy"})
        for target in (right, wrong)
    ]
    canvases = scored(family, asked)
    for question, canvas in zip(asked, canvases, strict=True):
        check(question, canvas, family)
    assert canvases[0].scored.to_dict() == asked[0].expected(family)
    assert facts.mask_id == MASK


def test_a_mask_as_the_surest_token_is_not_greedy() -> None:
    """LLaDA's rule reads the whole vocabulary, and its mask never turns into text."""
    frame = [peak((MASK, 0.9)), peak((1, 0.8))]
    model = ScriptedModel("llada", frame)
    question = Question(model, (2,), (1, 1), {"method": "greedy"})
    (canvas,) = scored("llada", [question])
    assert canvas.scored.to_dict() == {"is_greedy": False}
    assert canvas.num_forwards == 1


def test_cost_in_forwards() -> None:
    model, target = ToyModel(1), (1, 2, 4, 8, 10)
    asked = [
        Question(model, (1,), target, {"method": "mc", "num_samples": 7}),
        Question(model, (1,), target, {"method": "chain"}),
        Question(model, (1,), target, {"method": "confidence"}),
        Question(model, (1,), target[:1], {"method": "mc"}),
        Question(model, (1,), target, {"method": "mc"}),
    ]
    canvases = scored("llada", asked)
    assert [canvas.num_forwards for canvas in canvases] == [7, 5, 5, 1, 128]


def test_what_the_model_sees() -> None:
    """`chain` masks all later tokens; `confidence` starts where the model is surest."""
    frame = [peak((JUNK, 0.5)), peak((JUNK, 0.9)), peak((JUNK, 0.7))]
    seen = {}
    for method in ("chain", "confidence"):
        model = ScriptedModel("llada", frame)
        scored("llada", [Question(model, (2,), (1, 4, 8), {"method": method})])
        seen[method] = [ids[1:] for ids in model.seen]
    assert seen["chain"] == [[MASK] * 3, [1, MASK, MASK], [1, 4, MASK]]
    assert seen["confidence"] == [[MASK] * 3, [MASK, 4, MASK], [MASK, 4, 8]]


def test_logits_with_a_nan_score_as_nothing() -> None:
    frame = [torch.full((VOCAB,), torch.nan), peak((1, 0.5))]
    model = ScriptedModel("llada", frame)
    (canvas,) = scored("llada", [Question(model, (2,), (1, 1), {"method": "chain"})])
    found = canvas.scored.to_dict()
    assert found["log_likelihood"] is None
    assert found["token_log_likelihoods"][0] is None


@pytest.mark.parametrize(
    "given, key",
    [
        ({"method": "sum"}, "method"),
        ({"method": 3}, "method"),
        ({"method": "mc", "num_samples": 0}, "num_samples"),
        ({"method": "mc", "num_samples": 1025}, "num_samples"),
        ({"method": "mc", "num_samples": True}, "num_samples"),
        ({"method": "chain", "num_samples": 4}, "num_samples"),
        ({"method": "mc", "batch_size": 0}, "batch_size"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"max_forwards": 2}, "max_forwards"),
        ({"threshold": 2}, "threshold"),
    ],
)
def test_wrong_keys(given: dict[str, Any], key: str) -> None:
    with pytest.raises(OptionError) as error:
        Scoring.of(given, (1, 2), FAMILY["llada"])
    assert error.value.key == key


def test_the_method_that_a_family_publishes() -> None:
    assert Scoring.of({}, (1, 2), FAMILY["dream"]).to_dict() == {
        "method": "chain",
        "cfg_scale": 0.0,
    }
    assert Scoring.of({}, (1, 2), FAMILY["llada"]).to_dict() == {
        "method": "mc",
        "cfg_scale": 0.0,
        "num_samples": 128,
        "batch_size": 16,
    }
    (one,) = [Scoring.of({}, (1,), FAMILY["llada"])]
    assert one.to_dict()["num_samples"] == 1
    again = Scoring.of(one.carried(), one.continuation, FAMILY["llada"])
    assert again == one
