"""The reference algorithms on cases small enough to be worked out on paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from reference.algorithms import DEFAULTS, nfe_at_visible, run
from reference.canvas import Sampling
from reference.decoding import Result
from reference.script import (
    EOS,
    MASK,
    NEWLINE,
    TURN_END,
    VOCAB,
    Script,
    decode,
    row,
    says,
    sizes,
)

# --- LLaDA ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (12, [1] * 12),
        (3, [4, 4, 4]),
        (7, [2, 1, 1, 2, 2, 2, 2]),  # 3, 2, 2 steps for blocks of 4
        (30, [1] * 12),  # 10 steps for 4 masks: the other 6 commit nothing
    ],
)
def test_llada_schedule(steps: int, want: list[int]) -> None:
    _, got = decode("LLaDA", says("llada", *[0.5] * 12), block_size=4, steps=steps)
    assert sizes(got) == want
    assert [i for step in got for i in step] == [*range(12)]  # ties: lower first


def test_llada_short_last_block() -> None:
    # 10 steps for 3 blocks are 4, 3, 3: the short block of 2 leaves one unused.
    _, got = decode("LLaDA", says("llada", *[0.5] * 10), block_size=4)
    assert sizes(got) == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    with pytest.raises(ValueError):
        decode("LLaDA", says("llada", *[0.5] * 10), block_size=4, steps=2)


def test_llada_most_confident_first() -> None:
    model = says("llada", 0.5, 0.8, 0.6, 0.95, prompt_len=2)
    result, got = decode("LLaDA", model, block_size=3, steps=6)
    assert got == [[1], [2], [0], [3]]
    assert result.trace[0].margin == pytest.approx(0.2)
    # Nothing competes with the last one, whose token has ln(.95 / (.05 / 7)).
    assert result.trace[3].margin == pytest.approx(math.log(0.95 * 7 / 0.05))


def test_llada_random_remasking() -> None:
    order = {0: 0.3, 1: 0.9, 2: 0.1, 3: 0.6}
    asked = []

    def uniform(stream: str, step: int, position: int) -> float:
        asked.append((stream, step, position))
        return order[position]

    model = says("llada", 0.9, 0.5, 0.8, 0.6, prompt_len=3)
    _, got = decode("LLaDA", model, Sampling(uniform=uniform), remasking="random")
    assert got == [[1], [3], [0], [2]]
    assert asked[:5] == [*(("order", 0, i) for i in range(4)), ("order", 1, 0)]


def test_llada_guidance() -> None:
    # Guided logits: 2 + 2 (1 - 2) = 0 for token 0, 0 + 2 (.5 - 0) = 1 for token 1.
    seeing, blind = (torch.full((VOCAB,), -30.0) for _ in range(2))
    seeing[:2], blind[:2] = torch.tensor([1.0, 0.5]), torch.tensor([2.0, 0.0])
    model = Script("llada", *[[seeing] * 2, [blind] * 2] * 2, prompt_len=1)
    result, _ = decode("LLaDA", model, cfg_scale=1.0)
    assert result.ids == [1, 1] and result.nfe == 2
    assert model.seen == [[0, MASK, MASK], [MASK] * 3, [0, 1, MASK], [MASK, 1, MASK]]
    # Both are equally confident, then none competes.
    assert [step.margin for step in result.trace] == [0, pytest.approx(1.0)]
    model = Script("llada", [seeing] * 2, prompt_len=1)
    nothing = {"unconditional": lambda ids: torch.zeros(len(ids), VOCAB)}
    assert run("LLaDA", model, [0], 2, {"cfg_scale": 1.0}, **nothing).ids == [0, 0]


def test_llada_eos_options() -> None:
    frame = [row((EOS, 0.6), (2, 0.3)), (1, 0.4), (TURN_END, 0.9), (3, 0.5)]
    result, got = decode("LLaDA", Script("llada", frame))
    assert result.ids == [EOS, 1, TURN_END, 3] and got == [[2], [0], [3], [1]]
    # Never predicted; the .3 of token 2 is .75 of what is left of its row.
    result, got = decode("LLaDA", Script("llada", frame), logits_eos_inf=True)
    assert result.ids == [2, 1, TURN_END, 3] and got == [[2], [0], [3], [1]]
    # Predicted, but last: confidence 0, lower position first.
    result, got = decode("LLaDA", Script("llada", frame), confidence_eos_eot_inf=True)
    assert result.ids == [EOS, 1, TURN_END, 3] and got == [[3], [1], [0], [2]]
    # The two ends are exactly tied at 0, which is no close call.
    assert result.trace[2].margin > 0.1


# --- Dream ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (256, [1] * 254 + [2]),  # step 0 would commit none and runs no forward
        (128, [1] + [2] * 126 + [3]),
        (64, [3] + [4] * 62 + [5]),
        (8, [31] + [32] * 6 + [33]),
    ],
)
def test_dream_schedule(steps: int, want: list[int]) -> None:
    _, got = decode("Dream", says("dream", *[0.5] * 256), steps=steps)
    assert sizes(got) == want


def test_dream_rankings() -> None:
    rows = [
        row((0, 0.55), (1, 0.4494)),  # two candidates: least entropy
        row((0, 0.56), (1, 0.24)),  # the best one is best
        row((0, 0.50)),  # the others have 1/14 each: largest margin
    ]
    for alg, first in (("maskgit_plus", 1), ("topk_margin", 2), ("entropy", 0)):
        # In float32 3 (1 - .6666667) is 1 and 2 (1 - .5) less: 1, none, then 2.
        _, got = decode("Dream", Script("dream", rows), alg=alg, steps=3, eps=0.0)
        assert sizes(got) == [1, 2] and got[0] == [first]


def test_dream_margin_ignores_the_mask_token() -> None:
    # .6 - .3 against .5 - .1: as a token the mask would leave position 1 only .1.
    rows = [row((0, 0.6), (1, 0.3)), row((0, 0.5), (1, 0.1), (MASK, 0.4))]
    options = {"alg": "topk_margin", "steps": 2, "eps": 0.0}
    assert decode("Dream", Script("dream", rows), **options)[1] == [[1], [0]]


def test_dream_origin() -> None:
    draws = {(0, 0): 0.6, (0, 1): 0.7, (0, 2): 0.9, (1, 0): 0.3, (1, 1): 0.5}

    def uniform(stream: str, step: int, position: int) -> float:
        return draws.get((step, position), 0.99) if stream == "order" else 0.0

    # eps 0, 3 steps: p = 1/3, 1/2, 1. The first step commits none but is a forward.
    options = {"alg": "origin", "steps": 3, "eps": 0.0}
    model, sampling = says("dream", 0.9, 0.8, 0.7), Sampling(uniform=uniform)
    result, got = decode("Dream", model, sampling, **options)
    assert got == [[], [0], [1, 2]] and result.trace[0].margin == math.inf


def test_dream_alg_temp() -> None:
    # A difference of .1 cannot beat the Gumbel numbers -ln(-ln u) of these draws.
    draws = {0: 0.5, 1: 0.0, 2: 0.6}
    sampling = Sampling(uniform=lambda stream, step, position: draws[position])
    model = says("dream", 0.5, 0.9, 0.4)
    options = {"alg": "maskgit_plus", "alg_temp": 1.0, "steps": 3, "eps": 0.0}
    result, got = decode("Dream", model, sampling, **options)
    assert got == [[2], [0, 1]]
    keys = [c - math.log(-math.log(u)) for c, u in ((0.5, 0.5), (0.4, 0.6))]
    assert result.trace[0].margin == pytest.approx(keys[1] - keys[0])
    # Close to temperature 0 the values decide.
    options["alg_temp"] = 0.001
    _, got = decode("Dream", says("dream", 0.5, 0.9, 0.4), sampling, **options)
    assert got == [[1], [0, 2]]


# --- temperature ------------------------------------------------------------------


def drawn(family: str, u: float, **options: Any) -> Result:
    """Two positions: tokens 0, 1, 2 have .2, .5, .1, the mask .2, the rest a trace."""
    peaks = row((0, 0.2), (1, 0.5), (2, 0.1 - 4e-9), (MASK, 0.2))
    model = Script(family, [peaks, peaks])
    sampling = Sampling(temperature=1.0, uniform=lambda *_: u, **options)
    return decode("FastDLLM", model, sampling, threshold=0.15)[0]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_draws_invert_the_cumulative_distribution(family: str) -> None:
    # Without the mask token: .25, .625, .125; borders at .25 and .875.
    for u, token in ((0.0, 0), (0.2499, 0), (0.2501, 1), (0.8749, 1), (0.8751, 2)):
        assert drawn(family, u).ids == [token, token]
    assert drawn(family, 0.2499).trace[0].margin == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_top_p_and_top_k(family: str) -> None:
    # Better than 1, 0, 2: 0, .625, .875. A token goes once that exceeds top_p.
    for top_p, low, high in ((0.0, 1, 1), (0.62, 1, 1), (0.63, 0, 1), (0.88, 0, 2)):
        assert drawn(family, 0.1, top_p=top_p).ids == [low] * 2
        assert drawn(family, 0.99, top_p=top_p).ids == [high] * 2
    for top_k, low, high in ((1, 1, 1), (2, 0, 1), (3, 0, 2), (0, 0, 2)):
        assert drawn(family, 0.1, top_k=top_k).ids == [low] * 2
        assert drawn(family, 0.99, top_k=top_k).ids == [high] * 2


def test_confidence_of_a_drawn_token() -> None:
    # Token 0 has .8 of the row, above .7, but less of what temperature 4 draws from.
    for family, num_forwards in (("llada", 1), ("dream", 2)):
        hot = Sampling(temperature=4.0, uniform=lambda *_: 0.0)
        model = says(family, 0.8, 0.8, token=0)
        result, _ = decode("FastDLLM", model, hot, threshold=0.7)
        assert result.ids == [0, 0] and result.nfe == num_forwards
    # The models' own samplers keep their rule on any model: .5 is less than .6 of a
    # row, but more without the mask token.
    rows, warm = [row((0, 0.5), (MASK, 0.45)), (0, 0.6)], replace(hot, temperature=1.0)
    for family in ("llada", "dream"):
        assert decode("LLaDA", Script(family, rows), warm)[1] == [[1], [0]]
        options = {"alg": "maskgit_plus", "steps": 2, "eps": 0.0}
        assert decode("Dream", Script(family, rows), warm, **options)[1] == [[0], [1]]


def test_seed_step_and_position_make_the_token() -> None:
    def sampled(seed: int) -> list[int]:
        model = says("llada", *[0.2] * 16)
        return decode("LLaDA", model, Sampling(1.0, seed=seed), block_size=4)[0].ids

    assert sampled(1) == sampled(1) != sampled(2)
    assert MASK not in sampled(1) + sampled(2)


# --- by confidence ----------------------------------------------------------------


def test_fast_dllm_threshold() -> None:
    _, got = decode("FastDLLM", says("llada", 0.95, 0.91, 0.5, 0.6, 0.89, 0.3, 0.99))
    assert got == [[0, 1, 6], [4], [3], [2], [5]]
    model = says("llada", 0.5, 0.6, 0.95, 0.91, 0.92)
    _, got = decode("FastDLLM", model, block_size=3)
    assert got == [[2], [1], [0], [3, 4]]  # the block first, whatever is behind it
    # A probability without rounding: equal is enough.
    exact = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
    exact[:2] = 0.0
    for threshold, want in ((0.5, [3]), (0.51, [1, 1, 1])):
        model = Script("llada", [exact] * 3)
        assert sizes(decode("FastDLLM", model, threshold=threshold)[1]) == want


def test_fast_dllm_factor() -> None:
    # Factor 1: ranks 2, 3, 4 need 2/3, 3/4, 4/5.
    for confidences, first in (
        ((0.9, 0.85, 0.81), [0, 1, 2]),
        ((0.2,), [0]),
        ((0.9, 0.1), [0, 1]),  # only the last one fails: taken all the same
        ((0.9, 0.7, 0.1), [0, 1, 2]),
        ((0.9, 0.7, 0.74, 0.2), [0, 2]),  # rank 3 has .7 < .75
        ((0.9, 0.5, 0.4), [0]),
        ((0.8, 0.6, 0.95, 0.78, 0.5), [0, 2, 3]),
    ):
        _, got = decode("FastDLLM", says("llada", *confidences), factor=1.0)
        assert got[0] == first


def test_fast_dllm_quota_on_dream() -> None:
    # Shares of 7 in 3 steps: 3, 2, 2.
    model = says("dream", 0.95, 0.5, 0.6, 0.7, 0.92, 0.4, 0.3)
    _, got = decode("FastDLLM", model, steps=3)
    # Considered: 0 4 3, two left 1. With 2 more: 3 2 1, only the best, left 2. With 2
    # more all four that remain: the best only. Then what was left: 3, 2, 1.
    assert got == [[0, 4], [3], [2], [1], [5], [6]]
    _, got = decode("FastDLLM", says("dream", *[0.95] * 7), steps=3)
    assert sizes(got) == [3, 2, 2]
    # Default: one step per 32 tokens, the short rest has one too.
    assert sizes(decode("FastDLLM", says("dream", *[0.95] * 40))[1]) == [20, 20]
    # The factor's ranks are those of the considered: 2 of 4 in each of 2 steps.
    _, got = decode("FastDLLM", says("dream", 0.9, 0.1, 0.2, 0.3), factor=1.0, steps=2)
    assert got == [[0, 3], [1, 2]]


def test_local_leap() -> None:
    # Anchors 0 and 9. Radius 2 makes .75 enough at 1, 2, 7, 8, 10, 11, not at 3.
    model = says("llada", 0.95, 0.8, 0.7, 0.8, 0.2, 0.8, 0.2, 0.76, 0.2, 0.91)
    _, got = decode("LocalLeap", model, radius=2)
    assert got[0] == [0, 1, 7, 9]
    # 3 and 5 are two left with .8 and no anchor: the best one, the lower position.
    assert got[1:] == [[3], [5], [2], [4], [6], [8]]
    # An anchor behind the end of the block is none.
    model = says("llada", 0.5, 0.8, 0.95, 0.95)
    assert decode("LocalLeap", model, block_size=2)[1] == [[1], [0], [2, 3]]


def test_adaptive_parallel() -> None:
    model = says("llada", 0.2, 0.9, 0.25, 0.8, 0.35, 0.7, prompt_len=2)
    _, got = decode("AdaptiveParallel", model, max_parallel=3)
    assert got == [[1, 3, 5], [4], [2], [0]]


def test_hierarchical() -> None:
    # Runs: all; then 0 1 and 3 and 5 6, of which only .7 and .65 pass .62.
    model = says("dream", 0.3, 0.7, 0.95, 0.5, 0.93, 0.4, 0.65)
    _, got = decode("Hierarchical", model)
    assert got == [[2, 4], [1, 6], [3], [5], [0]]
    # Ties within a run are all taken, between blocks nothing is; `c > low` is strict.
    model = says("llada", 0.7, 0.7, 0.6, 0.8, 0.7)
    assert decode("Hierarchical", model, block_size=3)[1] == [[0, 1], [2], [3], [4]]
    assert decode("Hierarchical", says("llada", 0.5, 0.5))[1] == [[0], [1]]


def test_credit() -> None:
    # A token at p has the credit p after its first step, .8 p + p after the second.
    options = {"credit_alpha": 3.0, "boost_gamma": 1.0}

    def fused(p: float, credit: float) -> float:
        return p * (1 + credit) ** 3 / (1 - p + p * (1 + credit) ** 3)

    once, twice = fused(0.5, 0.5), fused(0.5, 0.9)
    assert (once, twice) == pytest.approx((0.77143, 0.87276), abs=1e-5)
    for bound, low, high in (
        (once, [[0, 1, 2]], [[1, 2], [0]]),
        (twice, [[1], [0, 2]], [[1], [2], [0]]),
    ):
        for threshold, want in ((bound - 1e-6, low), (bound + 1e-6, high)):
            model = says("llada", 0.5, 0.999, 0.6)
            result, got = decode("Credit", model, threshold=threshold, **options)
            assert got == want
            margin = min(step.margin for step in result.trace)
            assert margin == pytest.approx(1e-6, rel=1e-3)


def test_credit_changes_the_token_and_starts_anew_with_a_block() -> None:
    # Token 1 leads for two steps, then 2 by a little: the credit of 1 outweighs it.
    # Position 1 is there to make progress, position 3 starts the next block.
    lead_1, lead_2 = row((1, 0.4), (2, 0.3)), row((1, 0.3), (2, 0.32))
    leads = (lead_1, lead_1, lead_2)
    frames = [[lead, (0, 0.9), (0, 0.8), lead] for lead in leads]
    model = Script("llada", *frames)
    result, got = decode("Credit", model, threshold=1.0, block_size=3)
    assert got == [[1], [2], [0], [3]] and result.ids == [1, 0, 0, 2]


def test_ada_block() -> None:
    # 16 tokens: the window has 4. The best newline in it is at 2, with .6.
    newlines = {1: 0.35, 2: 0.6, 4: 0.8}
    frame = [(NEWLINE, newlines[i]) if i in newlines else (1, 0.5) for i in range(16)]
    frame[3] = frame[7] = (1, 0.95)
    options = {"block_size": 5, "delimiter_threshold": 0.5}
    _, got = decode("AdaBlock", Script("llada", frame), **options)
    # Blocks: 0-2, then the newline at 4 ends 3-4, then none: 5-9, 10-14, 15.
    assert got[:5] == [[2], [0], [1], [3], [4]]
    assert got[5:10] == [[7], [5], [6], [8], [9]] and got[-1] == [15]
    # None is that good: the block has 5 tokens, of which 3 passes .9.
    options["delimiter_threshold"] = 0.95
    assert decode("AdaBlock", Script("llada", frame), **options)[1][0] == [3]
    # Other delimiters, and an answer too short for a window.
    _, got = decode("AdaBlock", Script("llada", frame), delimiter_ids=[1])
    assert got[0] == [3]
    _, got = decode("AdaBlock", says("llada", 0.95, 0.96, 0.97, token=NEWLINE))
    assert got == [[0, 1, 2]]


# --- for all of them --------------------------------------------------------------

EVERY = [(family, name) for family in DEFAULTS for name in DEFAULTS[family]]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_max_forwards(family: str, name: str) -> None:
    # Confidences that let no algorithm finish within 2 forwards.
    model = says(family, *[0.1251 + i / 1e5 for i in range(40)], prompt_len=1)
    size = {"block_size": 4} if "block_size" in DEFAULTS[family][name] else {}
    size |= {"delimiter_ids": [0]} if name == "AdaBlock" else {}
    free, _ = decode(name, model, **size)
    for limit in (1, 2, free.nfe, free.nfe + 1):
        result, got = decode(name, model, max_forwards=limit, **size)
        assert result.nfe == min(limit, free.nfe) and free.nfe > 2
        assert result.ids == [1] * 40
        same = min(limit, free.nfe) - (limit <= free.nfe)
        assert got[:same] == [step.committed for step in free.trace][:same]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_mask_token_is_never_predicted(family: str, name: str) -> None:
    model = Script(family, [row((MASK, 0.6), (2, 0.2))] * 5, prompt_len=2)
    result = run(name, model, [MASK, 3], 5, {})
    assert result.ids == [2] * 5  # short last blocks as well: 5 is no multiple of 32
    assert all(seen[:2] == [MASK, 3] for seen in model.seen)  # text, never decoded
    assert result.trace[0].mask_argmax == result.trace[0].committed


def test_forwards_until_the_visible_answer_is_there() -> None:
    # Committed last to first but for the block; the EOS at 2 hides 3 and 4.
    frame = [(1, 0.5), (1, 0.6), (EOS, 0.7), (1, 0.8), (1, 0.9), (1, 0.8)]
    model = Script("llada", frame)
    result, got = decode("FastDLLM", model, block_size=5, threshold=1.0)
    assert got == [[4], [3], [2], [1], [0], [5]]
    assert (nfe_at_visible(result, EOS), result.nfe) == (5, 6)
    assert nfe_at_visible(result, 0) == 6  # no EOS: all of it
    early = run("EntropyThreshold", Script("llada", frame), [], 6, {"early_stop": True})
    assert nfe_at_visible(early, EOS) == early.nfe


def test_unknown_options() -> None:
    for name, options in (("FastDLLM", {"block_size": 4}), ("Dream", {"cfg_scale": 1})):
        with pytest.raises(ValueError):
            run(name, says("dream", 0.5), [], 1, options)
