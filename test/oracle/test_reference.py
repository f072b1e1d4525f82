"""The oracle checked by itself: models, loops, and that its cases are not trivial."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.tiny_checkpoints import (
    DREAM_TOKENS,
    LLADA_TOKENS,
    write_dream,
    write_llada,
)
from reference.decoding import Result, first_eos, multi_block, single_block, visible
from reference.models import ReferenceModel, load, shift_right

FAMILIES = ("llada", "dream")
TOY_VOCAB, TOY_MASK, TOY_EOS = 12, 7, 3


class ToyModel:
    """Random logits that follow the canvas: cheap, uneven entropies, EOS and mask wins.

    The rows depend on every id of the canvas, so a wrong commit shows in all later
    forwards, as it would with a real model.
    """

    mask_id, eos_id = TOY_MASK, TOY_EOS

    def __init__(self, family: str, seed: int, eos_bias: float = 0.5) -> None:
        self.family, self.seed, self.eos_bias = family, seed, eos_bias
        self.num_calls = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, 12) float32."""
        self.num_calls += 1
        canvas_seed = hash((self.seed, *ids.tolist())) % 2**31
        rng = torch.Generator().manual_seed(canvas_seed)
        scale = torch.exp(1.5 * torch.randn(len(ids), 1, generator=rng))
        logits = torch.randn(len(ids), TOY_VOCAB, generator=rng) * scale
        logits[:, TOY_EOS] += self.eos_bias
        return logits


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    return load(write(tmp_path_factory.mktemp(request.param), seed=1))


def random_case(seed: int) -> tuple[list[int], int, dict[str, float | int]]:
    """Prompt (mask and EOS ids allowed in it), length, options."""
    rng = random.Random(seed)
    prompt = [rng.randrange(TOY_VOCAB) for _ in range(rng.randrange(0, 6))]
    options = {
        "block_size": rng.choice([1, 3, 4, 8]),
        "threshold": rng.choice([0.0, 0.3, 1.0, 1.8, 100.0]),
    }
    return prompt, rng.randrange(1, 33), options


def same_tokens_and_forwards(a: Result, b: Result) -> bool:
    return (a.ids, a.nfe, a.commit_order) == (b.ids, b.nfe, b.commit_order)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_llada_layout(tmp_path: Path, bias: bool, num_shards: int) -> None:
    write_llada(
        tmp_path,
        n_kv_heads=2,
        embedding_size=320,
        include_qkv_bias=bias,
        num_shards=num_shards,
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    shapes = {k: tuple(v.shape) for f in files for k, v in load_file(f).items()}
    block = "model.transformer.blocks.1."
    assert len(files) == num_shards
    assert len(shapes) == 3 + 2 * (12 if bias else 9)
    assert shapes["model.transformer.wte.weight"] == (320, 64)
    assert shapes["model.transformer.ff_out.weight"] == (320, 64)
    assert shapes[block + "ff_out.weight"] == (64, 160)
    assert shapes[block + "ff_proj.weight"] == (160, 64)
    assert shapes[block + "k_proj.weight"] == (32, 64)
    assert (block + "q_proj.bias" in shapes) is bias
    if num_shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(shapes)
    model = load(tmp_path)
    assert model.family == "llada"
    assert model.logits(torch.arange(5)).shape == (5, 320)


def test_sharding_and_seed_decide_weights(tmp_path: Path) -> None:
    ids = torch.arange(40, 60)

    def logits(name: str, **options: int) -> torch.Tensor:
        return load(write_dream(tmp_path / name, **options)).logits(ids)

    one = logits("one", seed=3)
    assert torch.equal(one, logits("three", seed=3, num_shards=3))
    assert not torch.allclose(one, logits("other", seed=4))


def test_qkv_bias_reaches_the_logits(tmp_path: Path) -> None:
    ids = torch.arange(40, 60)
    plain = load(write_llada(tmp_path / "plain")).logits(ids)
    biased = load(write_llada(tmp_path / "bias", include_qkv_bias=True)).logits(ids)
    assert not torch.allclose(plain, biased)


def test_dream_configs(tmp_path: Path) -> None:
    write_dream(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert config["architectures"] == ["DreamModel"]
    assert config["mask_token_id"] == DREAM_TOKENS["<|mask|>"]
    assert generation["mask_token_id"] is None
    assert load(tmp_path).mask_id == DREAM_TOKENS["<|mask|>"]


def test_tokenizers(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "  hi "}]
    # Left open, the `auto_map` makes transformers ask at the terminal.
    closed = {"trust_remote_code": False}
    llada = AutoTokenizer.from_pretrained(write_llada(tmp_path / "llada"), **closed)
    dream = AutoTokenizer.from_pretrained(write_dream(tmp_path / "dream"), **closed)
    for tokenizer in (llada, dream):
        ids = tokenizer("Ça\n4").input_ids
        assert ids == list("Ça\n4".encode())  # one id per byte, no BOS
        assert tokenizer.decode(ids) == "Ça\n4"
    assert LLADA_TOKENS["<|eot_id|>"] in llada("a <|eot_id|>").input_ids
    rendered = llada.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = llada(rendered).input_ids
    assert ids.count(LLADA_TOKENS["<|startoftext|>"]) == 1
    rendered = dream.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n  hi <|im_end|>\n<|im_start|>assistant\n"
    )


def test_attention_is_bidirectional(model: ReferenceModel) -> None:
    """Every position feels the last token."""
    ids = torch.arange(40, 64)
    changed = ids.clone()
    changed[-1] = 99
    difference = (model.raw_logits(ids) - model.raw_logits(changed)).abs().amax(-1)
    assert (difference > 1e-4).all()


def test_shift_belongs_to_dream_only(model: ReferenceModel) -> None:
    ids = torch.arange(40, 50)
    raw, usable = model.raw_logits(ids), model.logits(ids)
    if model.family == "llada":
        assert torch.equal(usable, raw)
    else:
        rows = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
        assert torch.equal(usable, raw[rows])
    assert shift_right(torch.arange(3)[:, None]).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_decoding_is_eventful(tmp_path: Path, write: Callable[..., Path]) -> None:
    """Spread entropies, EOS and mask-id wins: parity on these models proves something.

    Counted over a few seeds: one random model can lack one of the events.
    """
    rows, eos_wins, mask_wins = [], 0, 0
    for seed in range(4):
        model = load(write(tmp_path / str(seed), seed=seed))
        rng = torch.Generator().manual_seed(seed)
        for prompt_len in (2, 7, 14, 20, 30):
            prompt = torch.randint(32, 127, (prompt_len,), generator=rng)
            ids = torch.cat([prompt, torch.full((64,), model.mask_id)])
            logits = model.logits(ids)[prompt_len:].double()
            rows.append(logits)
            eos_wins += int((logits.argmax(-1) == model.eos_id).sum())
            mask_wins += int((logits.argmax(-1) == model.mask_id).sum())
    log_probs = torch.log_softmax(torch.cat(rows), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.95], dtype=entropy.dtype)
    lowest, low, middle, high = entropy.quantile(quantiles).tolist()
    assert lowest < 0.7 and low < 1.7 and middle < 2.6 and high > 3.2
    assert 5 < eos_wins < 200
    assert 1 < mask_wins < 200
    assert len(torch.cat(rows).argmax(-1).unique()) > 60


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("early_stop", [False, True])
def test_multi_block_reduces_to_single_block(family: str, early_stop: bool) -> None:
    """add = decoded = 1 is `single_block`, except for the stale mask of early stop."""
    num_stale = num_longer = 0
    for seed in range(120):
        prompt, length, options = random_case(seed)
        one = {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
        options |= {"early_stop": early_stop}
        toy = ToyModel(family, seed)
        single = single_block(toy, prompt, length, **options)
        published = multi_block(toy, prompt, length, **options, **one)
        fresh = multi_block(toy, prompt, length, **options, **one, stale_mask=False)
        assert same_tokens_and_forwards(single, fresh), seed
        stale = any(step.stale for step in published.trace)
        if not stale:
            assert same_tokens_and_forwards(single, published), seed
        num_stale += stale
        assert visible(single, TOY_EOS) == visible(published, TOY_EOS), seed
        assert single.nfe <= published.nfe
        num_stale += stale
        num_longer += single.nfe < published.nfe
    assert (num_stale > 0) is early_stop
    assert (num_longer > 0) is early_stop
    assert num_longer < 60


def test_stale_mask_changes_llada_tokens_only() -> None:
    """With several live blocks a stale global minimum displaces a real one (LLaDA)."""
    num_different = dict.fromkeys(FAMILIES, 0)
    for seed in range(400):
        prompt, _, options = random_case(seed)
        options |= {"block_add_threshold": 0.0, "decoded_token_threshold": 0.5}
        options |= {"threshold": 0.1, "early_stop": True}
        for family in FAMILIES:
            toy = ToyModel(family, seed)
            published = multi_block(toy, prompt, 16, **options)
            fresh = multi_block(toy, prompt, 16, **options, stale_mask=False)
            if not any(step.stale for step in published.trace):
                assert same_tokens_and_forwards(published, fresh)
            differs = visible(published, TOY_EOS) != visible(fresh, TOY_EOS)
            num_different[family] += differs
    assert num_different["dream"] == 0
    assert num_different["llada"] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("early_stop", [False, True])
def test_multi_block_invariants(family: str, early_stop: bool) -> None:
    early_exits = 0
    for seed in range(150):
        prompt, length, options = random_case(seed)
        rng = random.Random(-seed)
        toy = ToyModel(family, seed)
        result = multi_block(
            toy,
            prompt,
            length,
            **options,
            block_add_threshold=rng.choice([0.0, 0.1, 0.5, 1.0]),
            decoded_token_threshold=rng.choice([0.0, 0.5, 0.95, 1.0]),
            early_stop=early_stop,
        )
        check_result(result, toy, length, early_stop)
        early_exits += None in result.commit_order
    assert (early_exits > 10) is early_stop


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("early_stop", [False, True])
def test_single_block_invariants(family: str, early_stop: bool) -> None:
    for seed in range(100):
        prompt, length, options = random_case(seed)
        toy = ToyModel(family, seed)
        result = single_block(toy, prompt, length, **options, early_stop=early_stop)
        check_result(result, toy, length, early_stop)


def check_result(result: Result, toy: ToyModel, length: int, early_stop: bool) -> None:
    """Check what holds for any answer, whatever the loop and its options."""
    assert len(result.ids) == len(result.commit_order) == length
    assert TOY_MASK not in result.ids
    assert result.nfe == toy.num_calls == len(result.trace) <= 2 * length
    assert all(step.committed for step in result.trace)
    eos_at = first_eos(result.ids, TOY_EOS)
    for i, order in enumerate(result.commit_order):
        if order is None:
            assert early_stop and eos_at is not None and i > eos_at
        else:
            assert i in result.trace[order].committed
    if early_stop and eos_at is not None:
        assert set(result.ids[eos_at:]) == {TOY_EOS}


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_and_huge(family: str) -> None:
    """0: forced progress only, one token a forward. Huge: all live blocks at once."""
    never = {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
    common = {"block_size": 4, "early_stop": False}
    slow = multi_block(ToyModel(family, 1), [1], 10, threshold=0.0, **never, **common)
    assert slow.nfe == 10
    fast = multi_block(ToyModel(family, 1), [1], 10, threshold=99.0, **never, **common)
    assert fast.commit_order == [0] * 4 + [1] * 4 + [2] * 2
    # add = 0 opens the second block in the first iteration, then one more in each.
    eager = {"block_add_threshold": 0.0, "decoded_token_threshold": 1.0}
    fast = multi_block(ToyModel(family, 1), [1], 10, threshold=99.0, **eager, **common)
    assert fast.commit_order == [0] * 8 + [1] * 2


def test_threshold_is_inclusive_for_llada_only() -> None:
    """Uniform rows have an entropy that is exactly the threshold."""
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda ids: torch.zeros(len(ids), 4)  # noqa: E731
    probs = torch.full((4,), 0.25, dtype=torch.float64)
    exact = float(-(probs * torch.log(probs + 1e-12)).sum())
    for family, nfe in (("llada", 1), ("dream", 5)):
        result = single_block(
            rows,
            [1],
            5,
            block_size=5,
            threshold=exact,
            early_stop=False,
            family=family,
            mask_id=0,
            eos_id=3,
        )
        assert result.nfe == nfe
        assert result.ids == [1] * 5  # ties: first index, the mask id 0 skipped


def test_llada_may_spend_its_minimum_outside_the_first_block() -> None:
    """LLaDA's global minimum sits in a semi-active block; block 1 is forced as well."""

    def rows(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(ids), 5)
        logits[:, 1] = torch.arange(len(ids)) * 0.5  # later positions are surer
        return logits

    options = {"block_size": 2, "threshold": 0.0, "early_stop": False}
    options |= {"block_add_threshold": 0.0, "decoded_token_threshold": 1.0}
    options |= {"mask_id": 0, "eos_id": 4}
    llada = multi_block(rows, [1], 4, family="llada", **options)
    assert llada.commit_order == [1, 0, 1, 0]
    dream = multi_block(rows, [1], 4, family="dream", **options)
    assert dream.commit_order == [1, 0, 3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_inside_the_active_block(family: str) -> None:
    """EOS at 3 of a block of 8: the rest is filled, 0..2 are still decoded."""

    def rows(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(ids), 6)
        for i in range(len(ids)):
            logits[i, 1 + i % 4] = 1.0 + 0.1 * i  # later positions are surer
        logits[4] = torch.tensor([0.0, 0, 0, 0, 0, 50.0])
        return logits

    options = {"block_size": 8, "threshold": 0.01, "family": family}
    options |= {"mask_id": 0, "eos_id": 5}
    stopped = single_block(rows, [1], 16, early_stop=True, **options)
    assert stopped.nfe == 4
    assert stopped.commit_order == [3, 2, 1, 0] + [None] * 12
    assert stopped.ids == [2, 3, 4] + [5] * 13
    full = single_block(rows, [1], 16, early_stop=False, **options)
    assert visible(full, 5) == visible(stopped, 5)
    assert full.nfe == 16 and None not in full.commit_order
    multi = multi_block(
        rows,
        [1],
        16,
        early_stop=True,
        block_add_threshold=0.5,
        decoded_token_threshold=0.5,
        **options,
    )
    assert visible(multi, 5) == visible(stopped, 5)


def test_oracle_end_to_end(model: ReferenceModel) -> None:
    prompt = [40, 41, model.mask_id, 50]
    result = multi_block(
        model,
        prompt,
        21,
        block_size=8,
        threshold=1.0,
        block_add_threshold=0.1,
        decoded_token_threshold=0.95,
        early_stop=True,
    )
    assert len(result.ids) == 21
    assert model.mask_id not in result.ids
    assert 1 < result.nfe <= 42
