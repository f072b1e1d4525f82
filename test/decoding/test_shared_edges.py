"""Rules that all algorithms share, in close cases: ties, the mask, the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.scripted_model import ScriptedModel, decode, even, peak, steps_of, word
from helpers.toy_model import (
    EOS,
    MASK,
    Request,
    ToyModel,
    answer,
    facts_of,
    held,
    resolve,
)
from helpers.toy_model import decode as decode_batch
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser

# Options that make every step commit one position, the best. Dream has a schedule.
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
    model = ScriptedModel("llada", [even(2)] * 3)
    assert steps_of(model, algorithm, **ONE_A_STEP[algorithm]) == want


@EVERY
def test_equal_tokens_go_to_the_lower_id(algorithm: str) -> None:
    assert decode(ScriptedModel("llada", [even(4)] * 3), algorithm)[0] == [0, 0, 0]


@EVERY
def test_dream_reads_the_row_before(algorithm: str) -> None:
    frame = [peak((token, 0.99)) for token in (0, 1, 2)]
    assert decode(ScriptedModel("dream", frame), algorithm)[0] == [0, 1, 2]


@EVERY
def test_dream_reads_row_0_for_the_first_position(algorithm: str) -> None:
    class NoPrompt(ToyModel):
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.stack([peak((token, 0.99)) for token in (0, 1, 2)])

    request = Request(NoPrompt(0), (), 3, algorithm, {})
    for canvas in decode_batch("dream", [request] * 2):
        assert answer(canvas) == [0, 0, 1]


@EVERY
def test_the_mask_token_is_never_predicted(algorithm: str) -> None:
    frame = [peak((MASK, 0.6), (2, 0.2))] * 3
    assert decode(ScriptedModel("llada", frame), algorithm)[0] == [2, 2, 2]


@EVERY
def test_the_last_of_max_forwards_commits_all_that_is_left(algorithm: str) -> None:
    options = dict(ONE_A_STEP[algorithm])
    if algorithm not in ("Dream", "AdaptiveParallel"):
        options["block_size"] = 4
    for limit in (1, 2):
        model = ScriptedModel("llada", word(*[0.2 + i / 100 for i in range(12)]))
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
        model = ScriptedModel(family, word(0.5, 0.6))
        assert steps_of(model, algorithm, sampling, **options) == want


def test_the_models_own_samplers_keep_their_measure_on_any_model() -> None:
    # Without the mask token the first would be the surer one.
    frame = [peak((0, 0.5), (MASK, 0.45)), peak((0, 0.6))]
    sampling = SamplingOptions(temperature=1.0, top_k=1)
    dream = {"alg": "maskgit_plus", "steps": 2, "eps": 0.0}
    for family in ("llada", "dream"):
        assert steps_of(ScriptedModel(family, frame), "LLaDA", sampling) == [[1], [0]]
        assert steps_of(ScriptedModel(family, frame), "Dream", sampling, **dream) == [
            [0],
            [1],
        ]


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
    model = ScriptedModel("llada", word(0.3, 0.4, 0.5, 0.6, 0.8, 0.7))
    assert steps_of(model, algorithm, **options) == [[3], [2], [1], [0], [4], [5]]


# --- the end of a canvas ----------------------------------------------------------


def test_a_canvas_is_cut_short_where_the_last_forward_had_to_commit() -> None:
    for frame, limit, want in (
        ([even(2)] * 2, 1, False),  # all are sure enough
        ([even(2), even(4)], 1, True),
        ([even(2), even(4)], 2, False),  # the one that is left is the surest
    ):
        options = {"threshold": 0.5, "max_forwards": limit}
        request = Request(ScriptedModel("llada", frame), (1,), 2, "FastDLLM", options)
        (canvas,) = decode_batch("llada", [request])
        assert (canvas.cut_short, canvas.num_forwards) == (want, limit)
        assert canvas.num_committed == 2


def forwards_to_the_end(frame: list[torch.Tensor], *ends_at_eos: bool) -> list[int]:
    """Forwards of canvases that get the same logits and end at an EOS, or do not."""
    denoiser, canvases = Denoiser(facts_of("llada")), []
    for ends in ends_at_eos:
        request = Request(ToyModel(0), (1,), 0, "FastDLLM", {"threshold": 1.0})
        decoding = resolve("llada", request)
        canvas = decoding.new_canvas([1], len(frame), denoiser.facts, ends_at_eos=ends)
        denoiser.join(denoiser.prepare(canvas, decoding))
        canvases.append(canvas)
    denoiser.sync()
    while denoiser.canvases:
        rows = torch.stack([frame[0], *frame] * len(denoiser.canvases))
        denoiser.commit(held(rows[denoiser.pack().logits_indices]))
        denoiser.sync()
        denoiser.remove([canvas for canvas in canvases if canvas.done])
    return [canvas.num_forwards for canvas in canvases]


def test_a_canvas_ends_at_its_eos_once_all_before_it_is_there() -> None:
    # Written in the order 1 (the EOS), 0, 2, 3.
    frame = [*word(0.8), peak((EOS, 0.9)), *word(0.7, 0.6)]
    assert forwards_to_the_end(frame, True, False) == [2, 4]


@pytest.mark.parametrize("algorithm", ["EntropyThreshold", "FullAttnMultiBlock"])
def test_an_eos_that_leaves_nothing_to_decode_ends_the_canvas(algorithm: str) -> None:
    frame = [peak((EOS, 0.9999)), *word(0.5, 0.4)]
    options = {"threshold": 0.1, "early_stop": True}
    request = Request(ScriptedModel("llada", frame), (1,), 3, algorithm, options)
    (canvas,) = decode_batch("llada", [request])
    assert (canvas.num_forwards, canvas.num_committed) == (1, 1)
    assert answer(canvas) == [EOS] * 3


@pytest.mark.parametrize("algorithm", ["EntropyThreshold", "FullAttnMultiBlock"])
def test_early_stop_fills_and_the_filled_compete_once(algorithm: str) -> None:
    first = [even(4), peak((EOS, 0.9999)), even(4), even(4)]
    later = [even(4), even(1), even(2), even(4)]
    options = {"threshold": 0.1, "early_stop": True}
    model = ScriptedModel("llada", first, later)
    (canvas,) = decode_batch("llada", [Request(model, (1,), 4, algorithm, options)])
    # Step 2 sees the fill, but its lowest entropy is behind the EOS.
    assert [ids[1:] for ids in model.seen] == [
        [MASK] * 4,
        [MASK, EOS, EOS, EOS],
        [MASK, EOS, EOS, EOS],
    ]
    assert answer(canvas) == [0, EOS, EOS, EOS]
    assert canvas.num_committed == 2
    model = ScriptedModel("llada", first, later)
    decode(model, algorithm, ignore_eos=True, **options)
    assert model.seen[1][1:] == [MASK, EOS, MASK, MASK]


def test_a_broken_row_is_written_last_at_a_temperature() -> None:
    frame = [even(1) * float("nan"), *word(0.5, 0.4)]
    for sampling in (SamplingOptions(), SamplingOptions(temperature=1.0, top_k=1)):
        model = ScriptedModel("llada", frame)
        assert steps_of(model, "FastDLLM", sampling) == [[1], [2], [0]]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_each_canvas_of_a_batch_is_packed_and_read_by_itself(family: str) -> None:
    tokens = [[0, 1, 2], [8, 4, 2, 1], [10, 0, 8], [4, 4, 4, 0]]
    caches = ["dual", "none", "prefix", "none"]
    algorithms = ["FastDLLM", "FastDLLM", "LocalLeap", "LocalLeap"]
    crowd, models = [], []
    for mine, cache, algorithm in zip(tokens, caches, algorithms, strict=True):
        frame = [peak((t, 0.8 - i / 10)) for i, t in enumerate(mine)]
        models.append(ScriptedModel(family, frame))
        options = {**ONE_A_STEP[algorithm], "cache": cache}
        crowd.append(Request(models[-1], (2, 2, 1), len(mine), algorithm, options))
    canvases = decode_batch(family, crowd)
    assert [answer(canvas) for canvas in canvases] == tokens
    for model, mine in zip(models, tokens, strict=True):
        assert model.seen == [
            [2, 2, 1, *mine[:i], *[MASK] * (len(mine) - i)] for i in range(len(mine))
        ]
