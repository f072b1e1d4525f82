"""What all algorithms share, where it is close: ties, the last step, row 0, the mask.

`test/mutation.py` breaks the decoding one way at a time and expects these tests, for
each algorithm, to notice.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from told_model import Told, decode, even, peak, steps_of, word

from sglang_dllm.decoding.canvas import SamplingOptions
from toy_model import MASK, Request, ToyModel, answer
from toy_model import decode as decode_batch

# What makes every step commit one position, the best. Dream's schedule has its own.
ONE_A_STEP: dict[str, dict[str, Any]] = {
    "LLaDA": {},
    "Dream": {},
    "FastDLLM": {"threshold": 1.0},
    "EntropyThreshold": {"threshold": 0.1},
    "FullAttnMultiBlock": {"threshold": 0.1, "early_stop": False},
    "LocalLeap": {"anchor_threshold": 1.0, "neighbor_threshold": 1.0},
    "AdaptiveParallel": {"threshold": 1.0},
    "Hierarchical": {"threshold": 1.0, "low_threshold": 1.0},
    "Credit": {"threshold": 1.0},
    "AdaBlock": {"threshold": 1.0, "delimiter_ids": []},
}
EVERY = pytest.mark.parametrize("algorithm", ONE_A_STEP)
# Credit takes what ties with the best.
BY_RANK = pytest.mark.parametrize("algorithm", [a for a in ONE_A_STEP if a != "Credit"])


@BY_RANK
def test_equal_positions_go_lower_first(algorithm: str) -> None:
    # Dream's 3 steps: .999 of a mask, so no forward, then 1, then what is left.
    want = [[0], [1, 2]] if algorithm == "Dream" else [[0], [1], [2]]
    model = Told("llada", [even(2)] * 3)
    assert steps_of(model, algorithm, **ONE_A_STEP[algorithm]) == want


@EVERY
def test_equal_tokens_go_to_the_lower_id(algorithm: str) -> None:
    assert decode(Told("llada", [even(4)] * 3), algorithm)[0] == [0, 0, 0]


@EVERY
def test_dream_reads_the_row_before(algorithm: str) -> None:
    frame = [peak((token, 0.99)) for token in (0, 1, 2)]
    assert decode(Told("dream", frame), algorithm)[0] == [0, 1, 2]


@EVERY
def test_dream_reads_row_0_for_the_first_position(algorithm: str) -> None:
    class NoPrompt(ToyModel):
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.stack([peak((token, 0.99)) for token in (0, 1, 2)])

    (canvas,) = decode_batch("dream", [Request(NoPrompt(0), (), 3, algorithm, {})])
    assert answer(canvas) == [0, 0, 1]


@EVERY
def test_the_mask_token_is_never_predicted(algorithm: str) -> None:
    frame = [peak((MASK, 0.6), (2, 0.2))] * 3
    assert decode(Told("llada", frame), algorithm)[0] == [2, 2, 2]


@EVERY
def test_the_last_of_max_forwards_commits_all_that_is_left(algorithm: str) -> None:
    options = dict(ONE_A_STEP[algorithm])
    if algorithm not in ("Dream", "AdaptiveParallel"):
        options["block_size"] = 4
    for limit in (1, 2):
        model = Told("llada", word(*[0.2 + i / 100 for i in range(12)]))
        tokens, steps = decode(model, algorithm, max_forwards=limit, **options)
        assert tokens == [1] * 12
        want = {1: [12], 2: [1, 11]}
        assert [len(step) for step in steps] == want[limit]


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("FastDLLM", {"threshold": 0.9}),
        ("LocalLeap", {}),
        ("AdaptiveParallel", {"threshold": 0.9}),
        ("Hierarchical", {}),
        ("Credit", {"credit_alpha": 0.0}),
        ("AdaBlock", {}),
    ],
)
def test_the_confidence_of_a_draw_is_the_familys(
    algorithm: str, options: dict[str, Any]
) -> None:
    # Drawn from the best token alone: sure for Dream, as unsure as before for LLaDA.
    sampling = SamplingOptions(temperature=1.0, top_k=1)
    for family, want in (("llada", [[1], [0]]), ("dream", [[0, 1]])):
        model = Told(family, word(0.5, 0.6))
        assert steps_of(model, algorithm, sampling, **options) == want


def test_the_models_own_samplers_keep_their_measure_on_any_model() -> None:
    # Without the mask token the first would be the surer one.
    frame = [peak((0, 0.5), (MASK, 0.45)), peak((0, 0.6))]
    sampling = SamplingOptions(temperature=1.0, top_k=1)
    dream = {"alg": "maskgit_plus", "steps": 2, "eps": 0.0}
    for family in ("llada", "dream"):
        assert steps_of(Told(family, frame), "LLaDA", sampling) == [[1], [0]]
        assert steps_of(Told(family, frame), "Dream", sampling, **dream) == [[0], [1]]


@pytest.mark.parametrize(
    "algorithm", [a for a in ONE_A_STEP if a not in ("Dream", "AdaptiveParallel")]
)
def test_blocks_start_behind_the_prompt(algorithm: str) -> None:
    # The prompt has one token, the surest position is the last of the first block.
    options = {**ONE_A_STEP[algorithm], "block_size": 4}
    if algorithm == "LLaDA":
        options |= {"steps": 8}  # enough for one position each, in both blocks
    if algorithm == "FullAttnMultiBlock":
        options |= {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
    model = Told("llada", word(0.3, 0.4, 0.5, 0.6, 0.8, 0.7))
    assert steps_of(model, algorithm, **options) == [[3], [2], [1], [0], [4], [5]]
