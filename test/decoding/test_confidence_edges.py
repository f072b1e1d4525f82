"""Close cases of the rules by confidence: equality, ties, quotas, credit, blocks."""

from __future__ import annotations

import pytest
import torch

from helpers.scripted_model import (
    ScriptedModel,
    decode,
    even,
    first_steps,
    peak,
    steps_of,
    word,
)
from helpers.toy_model import MASK, NEWLINE, Request
from helpers.toy_model import decode as decode_batch
from sglang_dllm.decoding.algorithms.hierarchical import runs


def test_fast_dllm_at_its_threshold() -> None:
    frame = [even(4), even(2), even(1), even(2)]
    assert steps_of(ScriptedModel("llada", frame), "FastDLLM", threshold=0.5) == [
        [1, 2, 3],
        [0],
    ]


def test_fast_dllm_factor() -> None:
    # Factor 1: ranks 2, 3, 4 need 2/3, 3/4, 4/5.
    for confidences, first in (
        ((0.4, 0.35, 0.3), [0]),  # the first needs nothing
        ((0.9, 0.1), [0, 1]),  # only the last one fails: taken all the same
        ((0.9, 0.7, 0.74, 0.2), [0, 2]),  # rank 3 has .7 < .75
        ((0.8, 0.6, 0.95, 0.78, 0.5), [0, 2, 3]),
    ):
        got = steps_of(
            ScriptedModel("llada", word(*confidences)), "FastDLLM", factor=1.0
        )
        assert got[0] == first
    # Factor 1.5: rank 2 needs 1/2, and equal is enough; rank 3 needs 5/8.
    frame = [even(1), even(2), even(4), even(4)]
    assert steps_of(ScriptedModel("llada", frame), "FastDLLM", factor=1.5)[0] == [0, 1]


def test_fast_dllm_shares_on_dream() -> None:
    # Shares of 7 in 3 steps: 3, 2, 2. Considered: 0 4 3, two left 1. With 2 more:
    # 3 2 1, the best. With 2 more all that remain, then what was left.
    frame = word(0.95, 0.5, 0.6, 0.7, 0.92, 0.4, 0.3)
    got = steps_of(ScriptedModel("dream", frame), "FastDLLM", steps=3)
    assert got == [[0, 4], [3], [2], [1], [5], [6]]
    got = steps_of(ScriptedModel("dream", word(*[0.95] * 7)), "FastDLLM", steps=3)
    assert [len(step) for step in got] == [3, 2, 2]
    # 4 tokens in 2 steps: only the ranks of the 2 considered count.
    frame = word(0.9, 0.1, 0.2, 0.3)
    got = steps_of(ScriptedModel("dream", frame), "FastDLLM", steps=2, factor=1.0)
    assert got == [[0, 3], [1, 2]]


def test_local_leap_at_its_thresholds() -> None:
    frame = [even(8), even(4), even(2), even(4), even(8)]
    options = {"anchor_threshold": 0.5, "neighbor_threshold": 0.25}
    model = ScriptedModel(
        "llada", [even(1), even(8), even(8), even(8), even(8), *frame]
    )
    got = steps_of(model, "LocalLeap", radius=1, **options)
    assert got[0] == [0, 6, 7, 8]


def test_local_leap_radius_reaches_to_both_sides() -> None:
    frame = [even(4)] * 7
    frame[3] = even(1)
    options = {"anchor_threshold": 1.0, "neighbor_threshold": 0.25}
    got = steps_of(ScriptedModel("llada", frame), "LocalLeap", radius=2, **options)
    assert got[0] == [1, 2, 3, 4, 5]


def test_local_leap_anchors_stay_in_their_canvas() -> None:
    models = [
        ScriptedModel("llada", [even(1)] * 4),
        ScriptedModel("llada", word(0.8, 0.85)),
    ]
    crowd = [Request(m, (1,), len(m.frames[0]), "LocalLeap", {}) for m in models]
    decode_batch("llada", crowd)
    assert [ids[1:] for ids in models[1].seen] == [[MASK, MASK], [MASK, 1]]


def test_adaptive_parallel_at_its_threshold_and_number() -> None:
    frame = [even(4), even(1), even(2), even(4)]
    got = steps_of(ScriptedModel("llada", frame), "AdaptiveParallel", threshold=0.25)
    assert got == [[1, 2], [0], [3]]
    got = steps_of(
        ScriptedModel("llada", [even(2)] * 5), "AdaptiveParallel", max_parallel=2
    )
    assert got == [[0, 1], [2, 3], [4]]


def test_hierarchical_at_its_thresholds() -> None:
    # One run: its best, and what is above .5 strictly.
    frame = [even(2), even(1), even(2)]
    options = {"threshold": 0.5, "low_threshold": 0.25}
    got = steps_of(ScriptedModel("llada", frame), "Hierarchical", **options)
    assert got == [[1], [0, 2]]
    # Runs 0 and 2 3 behind the first step: .5 is not above .5.
    frame = [even(2), even(1), even(2), even(4)]
    options = {"threshold": 0.9, "low_threshold": 0.5}
    got = steps_of(ScriptedModel("llada", frame), "Hierarchical", **options)
    assert got == [[1], [0], [2], [3]]


def test_hierarchical_runs_end_where_a_position_is_missing() -> None:
    # After 1 and 4: the runs 0, 2 3 and 5.
    frame = word(0.7, 0.99, 0.65, 0.3, 0.98, 0.66)
    got = steps_of(ScriptedModel("llada", frame), "Hierarchical")
    assert got == [[1, 4], [0, 2, 5], [3]]
    canvas = torch.tensor([0, 0, 1, 1, 1])
    positions = torch.tensor([0, 1, 2, 3, 5])
    assert runs(canvas, positions).tolist() == [0, 0, 1, 1, 2]


def test_hierarchical_takes_all_that_are_best_in_a_run() -> None:
    frame = [even(2), even(2), even(4)]
    got = steps_of(ScriptedModel("llada", frame), "Hierarchical", low_threshold=0.4)
    assert got == [[0, 1], [2]]


def test_credit_at_its_threshold_and_next_to_the_best() -> None:
    frame = [even(2), even(1), even(4)]
    got = steps_of(
        ScriptedModel("llada", frame), "Credit", threshold=0.5, credit_alpha=0.0
    )
    assert got == [[0, 1], [2]]
    frame = word(0.5, 0.499995, 0.49998)
    assert steps_of(ScriptedModel("llada", frame), "Credit", credit_alpha=0.0) == [
        [0, 1],
        [2],
    ]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_credit_grows_and_decays(gamma: float) -> None:
    # .5 has the credit b = .5 ** gamma after its first step, .8 b + b after the second.
    def raised(credit: float) -> float:
        return 0.5 * (1 + credit) ** 3 / (0.5 + 0.5 * (1 + credit) ** 3)

    boost = 0.5**gamma
    options = {"credit_alpha": 3.0, "boost_gamma": gamma}
    for bound, sure, unsure in (
        (raised(boost), [[0, 1]], [[1], [0]]),
        (raised(1.8 * boost), [[2], [0, 1]], [[2], [1], [0]]),
    ):
        for threshold, want in ((bound - 1e-6, sure), (bound + 1e-6, unsure)):
            first = word(0.5, 0.999) if len(sure) == 1 else word(0.5, 0.6, 0.999)
            model = ScriptedModel("llada", first)
            got = steps_of(model, "Credit", threshold=threshold, **options)
            assert got[: len(want)] == want


def test_credit_is_of_its_block() -> None:
    # A .5 has .77 with the credit of one step, .92 with what block 1 left; .6 has .86.
    options = {"block_size": 2, "credit_alpha": 3.0, "boost_gamma": 1.0}
    for confidence, want in ((0.5, [[3], [2]]), (0.6, [[2, 3]])):
        model = ScriptedModel("llada", word(0.5, 0.999, confidence, 0.999))
        got = steps_of(model, "Credit", threshold=0.85, **options)
        assert got == [[1], [0], *want]


def test_credit_is_not_left_to_the_block_behind() -> None:
    options = {"credit_alpha": 3.0, "boost_gamma": 1.0, "threshold": 1.0}
    # In the last forward; of the place that ends the block token 0 would be raised.
    frame = [*word(0.5, 0.999), *[peak((1, 0.3), (0, 0.2))] * 2]
    model = ScriptedModel("llada", frame)
    got = decode(model, "Credit", block_size=2, max_forwards=2, **options)
    assert got == ([1] * 4, [[1], [0, 2, 3]])
    # Token 1 comes third in block 1, first and second in block 2, where the third
    # prediction is another: its credit is not that of token 1.
    one, other, last = peak((1, 0.5)), peak((0, 0.5)), peak((2, 0.4), (1, 0.35))
    pairs = [*[(other, one)] * 2, *[(one, one)] * 3, (one, last)]
    sure = word(0.999, 0.998)
    model = ScriptedModel("llada", *([a, *sure, b, *sure] for a, b in pairs))
    assert decode(model, "Credit", block_size=3, **options)[0] == [1] * 6


def test_credit_is_of_a_token_and_is_not_forgotten() -> None:
    options = {"threshold": 1.0, "credit_alpha": 3.0, "boost_gamma": 1.0}
    first = word(0.5, 0.999, 0.998)
    # One word has .4 left and .3 of its own, the other .5 of both.
    then = [peak((2, 0.5), (1, 0.3)), first[1]]
    assert decode(ScriptedModel("llada", first[:2], then), "Credit", **options)[0] == [
        2,
        1,
    ]
    # Twice predicted, a word has .72 left and outweighs the other's .4.
    then = [peak((2, 0.4), (1, 0.35)), *first[1:]]
    assert (
        decode(ScriptedModel("llada", first, first, then), "Credit", **options)[0]
        == [1] * 3
    )


def test_ada_block_at_its_thresholds() -> None:
    # 8 tokens: the window has 2. A newline of .5 ends the block at itself.
    newline = even(2).roll(NEWLINE)
    frame = [even(4), newline, *[even(2)] * 6]
    options = {"threshold": 0.5, "block_size": 4}
    got = steps_of(
        ScriptedModel("llada", frame), "AdaBlock", delimiter_threshold=0.5, **options
    )
    assert got == [[1], [0], [2, 3, 4, 5], [6, 7]]
    got = steps_of(
        ScriptedModel("llada", frame), "AdaBlock", delimiter_threshold=0.6, **options
    )
    assert got == [[1, 2, 3], [0], [4, 5, 6, 7]]


def test_ada_block_ends_at_the_best_delimiter_in_its_window() -> None:
    # 16 tokens: the window has 4; the newline at 4 is behind it, 1 and 2 tie.
    newlines = {1: 0.6, 2: 0.6, 4: 0.8}
    frame = word(*[0.5] * 16)
    for i, c in newlines.items():
        frame[i] = peak((NEWLINE, c))
    options = {"block_size": 5, "delimiter_threshold": 0.5}
    got = steps_of(ScriptedModel("llada", frame), "AdaBlock", **options)
    # Blocks: 0 1, then 2 to 4, whose newline is the best, then none: 5 to 9.
    assert got[:5] == [[1], [0], [4], [2], [3]]
    assert got[5:10] == [[5], [6], [7], [8], [9]]


def test_ada_block_decides_its_end_once_and_by_its_own_delimiters() -> None:
    frame = word(*[0.5] * 16)
    frame[1] = peak((1, 0.8))
    later = [peak((NEWLINE, 0.5)), frame[1], peak((1, 0.6)), *frame[3:]]
    got = steps_of(ScriptedModel("llada", frame, later), "AdaBlock", block_size=4)
    assert got[:5] == [[1], [2], [0], [3], [4]]
    frame = [peak((NEWLINE, 0.5)), *word(*[0.6] * 7)]
    crowd = [
        (ScriptedModel("llada", frame), {"delimiter_ids": ids})
        for ids in ([], [NEWLINE])
    ]
    assert first_steps("llada", "AdaBlock", *crowd) == [[1], [0]]


def test_published_delimiter_thresholds() -> None:
    for family, threshold in (("llada", 0.3), ("dream", 0.5)):
        for c, first in ((threshold - 0.01, [1]), (threshold + 0.01, [0])):
            frame = [peak((NEWLINE, c)), *word(*[0.6] * 3)]
            assert steps_of(ScriptedModel(family, frame), "AdaBlock")[0] == first
