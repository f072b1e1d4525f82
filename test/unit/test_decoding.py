"""Our decoder against the plain reference loops, on replayed random logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.decoding import Result, multi_block, single_block
from sglang_dllm.config import parse_decode_config
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.multi_block import MultiBlockDecoder
from sglang_dllm.decoding.sampling import counter_uniform, draw_tokens, filter_logits
from sglang_dllm.decoding.statistics import argmax_and_entropy
from sglang_dllm.families import FAMILIES, ModelFacts

MASK, EOS, VOCAB = 3, 5, 11
FAMILY = {"llada": FAMILIES["LLaDAModelLM"], "dream": FAMILIES["DreamModel"]}


class ToyModel:
    """Logits that depend on the whole canvas, position by position.

    Coarse values make ties common; scales from flat to saturated spread entropies.
    """

    def __init__(self, seed: int, eos_bias: float, coarse: bool) -> None:
        self.seed, self.eos_bias, self.coarse = seed, eos_bias, coarse

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        state = self.seed
        for token in ids.tolist():
            state = (state * 1_000_003 + token + 1) % (1 << 61)
        generator = torch.Generator().manual_seed(state)
        logits = torch.randn(len(ids), VOCAB, generator=generator)
        logits *= torch.rand(len(ids), 1, generator=generator) * 12
        if self.coarse:
            logits = logits.round()
        logits[:, EOS] += self.eos_bias
        return logits


def decode(
    models: list[ToyModel],
    prompts: list[list[int]],
    lengths: list[int],
    decoder: MultiBlockDecoder,
    early_stop: bool,
    sampling: SamplingOptions | None = None,
) -> list[Canvas]:
    """All canvases in one batch, the decoder's own logits rows, until each is done."""
    canvases = [
        Canvas.from_prompt(
            prompt,
            length,
            mask_id=MASK,
            eos_ids=(EOS,),
            early_stop=early_stop,
            sampling=sampling,
        )
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    active = [
        (model, decoder.start(canvas))
        for model, canvas in zip(models, canvases, strict=True)
    ]
    while active := [(m, b) for m, b in active if b.begin_step() is not None]:
        batch = [blocks for _, blocks in active]
        lens = [len(blocks.canvas) for blocks in batch]
        packed = torch.cat(
            [model(torch.from_numpy(blocks.canvas.ids)) for model, blocks in active]
        )
        rows = decoder.rows(batch, np.cumsum([0, *lens[:-1]]).tolist())
        decoder.commit_step(packed[rows], batch)
    return canvases


def shifted(model: ToyModel, shift: int):
    """What the reference calls logits: row i predicts position i."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        raw = model(ids)
        return torch.cat([raw[:1], raw[:-1]]) if shift else raw

    return logits


def visible(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


settings_of_a_run = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "family": st.sampled_from(["llada", "dream"]),
        "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        "length": st.integers(1, 40),
        "block_size": st.sampled_from([1, 4, 5, 8, 32]),
        "threshold": st.sampled_from([0.0, 0.1, 0.4, 0.5, 1.0, 2.0, 999.0]),
        "add": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "decoded": st.sampled_from([0.5, 0.95, 1.0]),
        "early_stop": st.booleans(),
        "eos_bias": st.sampled_from([-50.0, 0.0, 3.0]),
        "coarse": st.booleans(),
    }
)


def reference_of(run: dict) -> Result:
    family = FAMILY[run["family"]]
    model = ToyModel(run["seed"], run["eos_bias"], run["coarse"])
    return multi_block(
        shifted(model, family.shift),
        run["prompt"],
        run["length"],
        block_size=run["block_size"],
        threshold=run["threshold"],
        block_add_threshold=run["add"],
        decoded_token_threshold=run["decoded"],
        early_stop=run["early_stop"],
        family=run["family"],
        mask_id=MASK,
        eos_id=EOS,
    )


def multi_block_decoder(run: dict) -> MultiBlockDecoder:
    family = FAMILY[run["family"]]
    config = parse_decode_config(
        "FullAttnMultiBlock",
        family,
        {
            "block_size": run["block_size"],
            "threshold": run["threshold"],
            "block_add_threshold": run["add"],
            "decoded_token_threshold": run["decoded"],
        },
    )
    return MultiBlockDecoder(config, ModelFacts(family, MASK, (EOS,), VOCAB))


@settings(max_examples=150, deadline=None)
@given(settings_of_a_run)
def test_multi_block_equals_the_reference(run: dict) -> None:
    expected = reference_of(run)
    model = ToyModel(run["seed"], run["eos_bias"], run["coarse"])
    (canvas,) = decode(
        [model],
        [run["prompt"]],
        [run["length"]],
        multi_block_decoder(run),
        run["early_stop"],
    )
    answer = canvas.ids[canvas.prompt_len :].tolist()
    assert visible(answer) == visible(expected.ids)
    assert canvas.num_forwards == expected.nfe
    assert canvas.ids[: canvas.prompt_len].tolist() == run["prompt"]


@settings(max_examples=60, deadline=None)
@given(settings_of_a_run)
def test_single_block_equals_the_reference(run: dict) -> None:
    family = FAMILY[run["family"]]
    model = ToyModel(run["seed"], run["eos_bias"], run["coarse"])
    expected = single_block(
        shifted(model, family.shift),
        run["prompt"],
        run["length"],
        block_size=run["block_size"],
        threshold=run["threshold"],
        early_stop=False,
        family=run["family"],
        mask_id=MASK,
        eos_id=EOS,
    )
    config = parse_decode_config(
        "EntropyThreshold",
        family,
        {"block_size": run["block_size"], "threshold": run["threshold"]},
    )
    decoder = MultiBlockDecoder(config, ModelFacts(family, MASK, (EOS,), VOCAB))
    (canvas,) = decode([model], [run["prompt"]], [run["length"]], decoder, False)
    assert canvas.ids[canvas.prompt_len :].tolist() == expected.ids
    assert canvas.num_forwards == expected.nfe


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 2.0])
def test_a_crowd_gets_what_each_gets_alone(family: str, threshold: float) -> None:
    base = {
        "family": family,
        "block_size": 8,
        "threshold": threshold,
        "add": 0.1,
        "decoded": 0.95,
        "early_stop": True,
        "eos_bias": 1.0,
        "coarse": True,
    }
    runs = [
        {**base, "seed": i, "prompt": [i % 3] * (i + 1), "length": 3 + 5 * i}
        for i in range(7)
    ]
    canvases = decode(
        [ToyModel(r["seed"], r["eos_bias"], r["coarse"]) for r in runs],
        [r["prompt"] for r in runs],
        [r["length"] for r in runs],
        multi_block_decoder(base),
        True,
    )
    for run, canvas in zip(runs, canvases, strict=True):
        expected = reference_of(run)
        assert visible(canvas.ids[canvas.prompt_len :].tolist()) == visible(
            expected.ids
        )
        assert canvas.num_forwards == expected.nfe


def test_the_mask_token_is_never_predicted_and_entropy_counts_it() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK] = 9.0
    logits[0, 7] = 1.0
    tokens, entropy = argmax_and_entropy(logits, MASK)
    p = torch.softmax(logits[0].double(), -1)
    assert tokens.tolist() == [7]
    assert entropy[0] == -(p * (p + 1e-12).log()).sum()


def test_a_nan_row_blocks_nothing() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0] = float("nan")
    _, entropy = argmax_and_entropy(logits, MASK)
    assert entropy[0] == float("inf")
    assert entropy[1] < 3


def test_committed_prefix_is_handed_out_once_and_in_order() -> None:
    canvas = Canvas.from_prompt(
        [1, MASK], 4, mask_id=MASK, eos_ids=(EOS,), early_stop=False
    )
    canvas.commit(np.array([3]), np.array([8]))
    assert canvas.take_committed_prefix().tolist() == []
    canvas.commit(np.array([2]), np.array([7]))
    assert canvas.take_committed_prefix().tolist() == [7, 8]
    canvas.commit(np.array([4, 5]), np.array([9, 9]))
    assert canvas.take_committed_prefix().tolist() == [9, 9]
    assert canvas.take_committed_prefix().tolist() == []
    assert canvas.finished
    assert canvas.num_committed == 4


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    n = 4000
    logits = torch.tensor([[2.0, 1.0, 0.0, 50.0, -1.0]]).repeat(n, 1)
    uniform = (torch.arange(n) + 0.5).double() / n

    def draw(temperature: float, top_p: float, top_k: int) -> torch.Tensor:
        tokens = draw_tokens(
            logits,
            3,
            torch.full((n,), temperature, dtype=torch.float64),
            torch.full((n,), top_p, dtype=torch.float64),
            torch.full((n,), top_k),
            uniform,
        )
        return torch.bincount(tokens, minlength=5).double() / n

    p = torch.softmax(torch.tensor([2.0, 1, 0, -torch.inf, -1]).double() / 0.7, -1)
    assert torch.allclose(draw(0.7, 1.0, 0), p, atol=1e-3)
    two = torch.softmax(torch.tensor([2.0, 1.0]).double(), -1)
    assert torch.allclose(draw(1.0, 1.0, 2)[:2], two, atol=1e-3)
    assert draw(1.0, 0.1, 0).tolist() == [1, 0, 0, 0, 0]
    assert draw(1e-3, 1.0, 0).tolist() == [1, 0, 0, 0, 0]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    one, zero = torch.ones(1).double(), torch.zeros(1).long()
    kept = filter_logits(logits, 0.6 * one, zero) > -torch.inf
    assert kept.tolist() == [[True, True, False]]


def test_counter_uniform_is_uniform_and_keyed_by_all_its_arguments() -> None:
    i = torch.arange(20_000)
    zero = torch.zeros_like(i)
    for args in ((i, zero, zero), (zero, i, zero), (zero, zero, i)):
        u = counter_uniform(*args)
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01
        assert len(u.unique()) == len(u)


def test_sampling_repeats_with_its_seed_alone_and_in_a_crowd() -> None:
    run = {
        "family": "llada",
        "block_size": 8,
        "threshold": 0.5,
        "add": 0.1,
        "decoded": 0.95,
    }
    decoder = multi_block_decoder(run)
    models = [ToyModel(i, 0.0, False) for i in range(3)]
    prompts, lengths = [[1], [1, 2], [4]], [20, 9, 13]
    hot = SamplingOptions(temperature=1.5, seed=7)
    crowd = decode(models, prompts, lengths, decoder, False, hot)
    alone = decode(models[:1], prompts[:1], lengths[:1], decoder, False, hot)
    other = decode(
        models[:1],
        prompts[:1],
        lengths[:1],
        decoder,
        False,
        SamplingOptions(temperature=1.5, seed=8),
    )
    assert crowd[0].ids.tolist() == alone[0].ids.tolist()
    assert alone[0].ids.tolist() != other[0].ids.tolist()
