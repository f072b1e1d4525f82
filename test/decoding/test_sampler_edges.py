"""Close cases of the entropy rule and of LLaDA's and Dream's own samplers."""

from __future__ import annotations

import math

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
from helpers.toy_model import EOS, MASK, TURN_END, VOCAB
from sglang_dllm.decoding.canvas import SamplingOptions


@pytest.mark.parametrize("algorithm", ["EntropyThreshold", "FullAttnMultiBlock"])
def test_dream_forces_progress_where_nothing_is_certain(algorithm: str) -> None:
    frame = word(0.3, 0.5, 0.4)
    assert steps_of(ScriptedModel("dream", frame), algorithm, threshold=0.1) == [
        [1],
        [2],
        [0],
    ]


@pytest.mark.parametrize("algorithm", ["EntropyThreshold", "FullAttnMultiBlock"])
def test_llada_takes_the_lowest_entropy_of_all_live_blocks(algorithm: str) -> None:
    frame = [even(4), even(8), even(4)]
    assert steps_of(ScriptedModel("llada", frame), algorithm, threshold=1.0)[0] == [0]


@pytest.mark.parametrize("algorithm", ["EntropyThreshold", "FullAttnMultiBlock"])
def test_the_entropy_adds_next_to_nothing_inside_its_logarithm(algorithm: str) -> None:
    # 1.94e-7 nats; with 1e-8 inside the logarithm it would be 1.77e-7.
    nearly = even(2)
    nearly[1] = math.log(1e-8)
    frame = [nearly, even(1)]
    steps = steps_of(ScriptedModel("dream", frame), algorithm, threshold=1.85e-7)
    assert steps == [[1], [0]]


def test_published_entropy_thresholds() -> None:
    def num_steps(family: str, algorithm: str, entropy: float) -> int:
        low, high = 0.5, 1.0
        for _ in range(60):  # the p of two tokens that has this entropy
            p = (low + high) / 2
            is_above = -p * math.log(p) - (1 - p) * math.log(1 - p) > entropy
            low, high = (p, high) if is_above else (low, p)
        row = even(2)
        row[0] = math.log(p / (1 - p))
        return len(steps_of(ScriptedModel(family, [row, row]), algorithm))

    for family, algorithm, threshold in (
        ("llada", "EntropyThreshold", 0.5),
        ("dream", "EntropyThreshold", 0.45),
        ("llada", "FullAttnMultiBlock", 0.5),
        ("dream", "FullAttnMultiBlock", 0.4),
    ):
        assert num_steps(family, algorithm, threshold - 0.01) == 1
        assert num_steps(family, algorithm, threshold + 0.01) == 2


def test_a_block_is_created_at_its_threshold_or_when_the_last_one_is_done() -> None:
    # Half of the first block is decoded by the first step.
    frame = [even(1), even(1), even(4), even(4), *[even(1)] * 4]
    options = {"threshold": 0.1, "block_size": 4}
    steps = steps_of(
        ScriptedModel("llada", frame),
        "FullAttnMultiBlock",
        block_add_threshold=0.5,
        **options,
    )
    assert steps == [[0, 1], [2, 4, 5, 6, 7], [3]]
    steps = steps_of(ScriptedModel("llada", frame), "EntropyThreshold", **options)
    assert steps == [[0, 1], [2], [3], [4, 5, 6, 7]]


def test_a_block_behind_a_finished_one_is_forced_to_move() -> None:
    frame = [even(1), even(4), even(4), even(4)]
    for add, progress in ((0.5, 0.5), (0.5, 1.0), (1.0, 1.0)):
        options = {"block_add_threshold": add, "decoded_token_threshold": progress}
        model = ScriptedModel("dream", frame)
        steps = steps_of(
            model, "FullAttnMultiBlock", threshold=0.1, block_size=2, **options
        )
        assert steps == [[0], [1], [2], [3]]


# --- the models' own samplers -----------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (3, [4, 4, 4]),
        (7, [2, 1, 1, 2, 2, 2, 2]),  # 3, 2, 2 steps for blocks of 4
        (30, [1] * 12),  # 10 steps for 4 masks: the other 6 run no forward
    ],
)
def test_llada_schedule(steps: int, want: list[int]) -> None:
    got = steps_of(
        ScriptedModel("llada", [even(2)] * 12), "LLaDA", block_size=4, steps=steps
    )
    assert [len(step) for step in got] == want


def test_llada_guidance() -> None:
    # 2 + 2 (1 - 2) = 0 for token 0, 0 + 2 (.5 - 0) = 1 for token 1.
    seeing, blind = (torch.full((VOCAB,), -30.0) for _ in range(2))
    seeing[:2], blind[:2] = torch.tensor([1.0, 0.5]), torch.tensor([2.0, 0.0])
    model = ScriptedModel("llada", [seeing] * 2, blind=[blind] * 2)
    assert decode(model, "LLaDA", cfg_scale=1.0) == ([1, 1], [[0], [1]])
    assert model.seen == [[1, MASK, MASK], [1, 1, MASK]]
    assert model.seen_blind == [[MASK] * 3, [MASK, 1, MASK]]


def test_llada_guidance_is_of_its_own_canvas() -> None:
    # Twice what is seen less what is not: 0 and 1, then -3 and 1, the surer one.
    def row(*logits: float) -> torch.Tensor:
        return torch.tensor([*logits, *[-30.0] * (VOCAB - 2)])

    guided = ScriptedModel(
        "llada", [row(1.0, 0.5)] * 2, blind=[row(2.0, 0.0), row(5.0, 0.0)]
    )
    alone = ScriptedModel("llada", word(0.6, 0.5))
    crowd = ((alone, {}), (guided, {"cfg_scale": 1.0}))
    assert first_steps("llada", "LLaDA", *crowd) == [[0], [1]]


def test_llada_eos_options() -> None:
    frame = [peak((EOS, 0.6), (2, 0.3)), peak((1, 0.4)), peak((TURN_END, 0.9))]

    def got(**options: bool) -> tuple[list[int], list[list[int]]]:
        return decode(ScriptedModel("llada", frame), "LLaDA", **options)

    assert got() == ([EOS, 1, TURN_END], [[2], [0], [1]])
    # Never predicted; token 2 has .75 of what is left of its row.
    assert got(logits_eos_inf=True) == ([2, 1, TURN_END], [[2], [0], [1]])
    # Predicted, but last.
    hidden = got(confidence_eos_eot_inf=True)
    assert hidden == ([EOS, 1, TURN_END], [[1], [0], [2]])


@pytest.mark.parametrize(
    ("length", "steps", "want"),
    [
        (256, 8, [31, *[32] * 6, 33]),
        (64, 64, [*[1] * 62, 2]),  # step 0 would commit none and runs no forward
    ],
)
def test_dream_schedule(length: int, steps: int, want: list[int]) -> None:
    got = steps_of(ScriptedModel("dream", [even(2)] * length), "Dream", steps=steps)
    assert [len(step) for step in got] == want


def test_dream_times_are_float32() -> None:
    # The third of 4 steps would commit one of two; in float32 that is none.
    got = steps_of(ScriptedModel("dream", [even(2)] * 4), "Dream", steps=4, eps=0.0)
    assert got == [[0], [1], [2, 3]]


def test_dream_measures() -> None:
    frame = [
        peak((0, 0.55), (1, 0.4494)),  # two candidates: least entropy
        peak((0, 0.56), (1, 0.24)),  # the best one is best
        peak((0, 0.50)),  # the others have .05 each: largest margin
    ]
    first = {"topk_margin": [2], "entropy": [0], "maskgit_plus": [1]}
    for algs in (*([alg] for alg in first), first):  # alone and in one batch
        options = [{"alg": alg, "steps": 3, "eps": 0.0} for alg in algs]
        crowd = [(ScriptedModel("dream", frame), each) for each in options]
        assert first_steps("dream", "Dream", *crowd) == [first[alg] for alg in algs]


def test_dream_measures_of_draws() -> None:
    # Margin and entropy put the first before the second, but not of its best two.
    frame = [peak((0, 0.5), (1, 0.2)), peak((0, 0.3))]
    best_two = SamplingOptions(temperature=1.0, top_k=2)
    for sampling, first in ((None, [0]), (best_two, [1])):
        for algs in (["entropy"], ["topk_margin"], ["entropy", "topk_margin"]):
            options = [{"alg": alg, "steps": 2, "eps": 0.0} for alg in algs]
            crowd = [(ScriptedModel("dream", frame), each) for each in options]
            got = first_steps("dream", "Dream", *crowd, sampling=sampling)
            assert got == [first] * len(algs)


def test_dream_margin_ignores_the_mask_token() -> None:
    # .6 - .3 against .5 - .1: as a token the mask would leave the second only .1.
    frame = [peak((0, 0.6), (1, 0.3)), peak((0, 0.5), (1, 0.1), (MASK, 0.4))]
    options = {"alg": "topk_margin", "steps": 2, "eps": 0.0}
    assert steps_of(ScriptedModel("dream", frame), "Dream", **options) == [[1], [0]]


def test_a_low_alg_temp_leaves_the_order_to_the_measure() -> None:
    frame = word(*[0.2 + i / 10 for i in range(7)])
    options = {"alg": "maskgit_plus", "alg_temp": 0.001, "steps": 8, "eps": 0.0}
    for seed in range(5):
        got = steps_of(
            ScriptedModel("dream", frame),
            "Dream",
            SamplingOptions(seed=seed),
            **options,
        )
        assert got[0] == [6]
