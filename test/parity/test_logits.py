"""Our model classes compute the reference's float32 logits, in ragged batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from helpers.changed_checkpoints import (
    change_config,
    change_tensors,
    copy_head,
    remove_head,
    with_half_the_heads,
    without_biases,
)
from helpers.other_process import run_module
from helpers.tiny_a2d_checkpoints import (
    write_a2d_llama,
    write_a2d_qwen2,
    write_a2d_qwen3,
    write_illada,
)
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import (
    DIFFULLAMA_FLAGS,
    LLADA_MOE_FLAGS,
    write_diffullama,
    write_llada_moe,
)
from reference.models import load
from sglang_dllm.config.dtype import is_native

TOLERANCE = 1e-4
VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llada-ungrouped-heads": lambda path: write_llada(path, seed=11),
    "llada-grouped-heads": lambda path: write_llada(path, n_kv_heads=2, seed=12),
    "llada-one-kv-head": lambda path: write_llada(path, n_kv_heads=1, seed=13),
    "llada-qkv-biases": lambda path: write_llada(path, include_qkv_bias=True, seed=14),
    "llada-three-shards": lambda path: write_llada(path, num_shards=3, seed=15),
    "llada-padded-embedding": lambda path: write_llada(
        path, embedding_size=320, seed=16
    ),
    "dream-grouped-heads": lambda path: write_dream(path, seed=17),
    "dream-two-shards": lambda path: write_dream(
        path, num_key_value_heads=4, num_shards=2, seed=18
    ),
    "moe-ungrouped-heads": lambda path: write_llada_moe(path, seed=21),
    "moe-inner-name": lambda path: write_llada_moe(
        path, architecture="LLaDAMoEModel", seed=22
    ),
    "moe-grouped-heads": lambda path: write_llada_moe(
        path, num_key_value_heads=2, seed=23
    ),
    "moe-three-shards": lambda path: write_llada_moe(path, num_shards=3, seed=24),
    "moe-more-experts": lambda path: write_llada_moe(
        path, num_experts=24, num_experts_per_tok=8, seed=25
    ),
    "moe-shares-scaled-to-one": lambda path: write_llada_moe(
        path, norm_topk_prob=True, seed=26
    ),
    "diffullama-ungrouped-heads": lambda path: write_diffullama(path, seed=27),
    "diffullama-grouped-heads": lambda path: write_diffullama(
        path, num_key_value_heads=2, seed=28
    ),
    "diffullama-two-shards": lambda path: write_diffullama(path, num_shards=2, seed=29),
    "llada-rope-parameters": lambda path: change_config(
        write_llada(path, seed=34),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.5}},
        without=["rope_theta"],
    ),
    "llada-few-fields": lambda path: change_config(
        write_llada(path, seed=35),
        {"n_kv_heads": None},
        without=["embedding_size", "rope", "weight_tying", "architectures"],
    ),
    "llada-tied": lambda path: change_config(
        copy_head(write_llada(path, seed=36)), {"weight_tying": True}
    ),
    "llada-no-head": lambda path: change_config(
        remove_head(write_llada(path, seed=37)), without=["weight_tying"]
    ),
    "dream-rope-parameters": lambda path: change_config(
        write_dream(path, seed=38),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        without=["rope_theta", "rope_scaling"],
    ),
    "dream-linear": lambda path: change_config(
        write_dream(path, seed=39), {"rope_scaling": {"type": "linear", "factor": 4}}
    ),
    "dream-llama3": lambda path: change_config(
        write_dream(path, seed=40), {"rope_scaling": LLAMA3}
    ),
    "dream-yarn": lambda path: change_config(
        write_dream(path, seed=41), {"rope_scaling": YARN}
    ),
    "dream-yarn-attention-factor": lambda path: change_config(
        write_dream(path, seed=42),
        {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16}},
    ),
    "dream-no-biases": lambda path: change_config(
        without_biases(write_dream(path, seed=43)), {"attention_bias": False}
    ),
    "dream-tied": lambda path: change_config(
        copy_head(write_dream(path, seed=44)), {"tie_word_embeddings": True}
    ),
    "dream-tied-no-head": lambda path: change_config(
        remove_head(write_dream(path, num_shards=1, seed=45)),
        {"tie_word_embeddings": True},
    ),
    "dream-few-fields": lambda path: change_config(
        write_dream(path, num_key_value_heads=4, seed=46),
        {"num_key_value_heads": None},
        without=["tie_word_embeddings", "rope_scaling"],
    ),
    "moe-rope-parameters": lambda path: change_config(
        write_llada_moe(path, seed=47),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        without=["rope_theta", "rope_scaling"],
    ),
    "diffullama-llama3": lambda path: change_config(
        write_diffullama(path, seed=48), {"rope_scaling": LLAMA3}
    ),
    "diffullama-narrow-heads": lambda path: with_half_the_heads(
        write_diffullama(path, seed=49)
    ),
    "illada-tied": lambda path: write_illada(path, seed=60),
    "illada-untied": lambda path: write_illada(path, tied=False, seed=61),
    "illada-tied-with-head": lambda path: copy_head(write_illada(path, seed=62)),
    "a2d_qwen3-tied": lambda path: write_a2d_qwen3(path, num_shards=2, seed=63),
    "a2d_qwen3-untied": lambda path: write_a2d_qwen3(path, tied=False, seed=64),
    "a2d_qwen3-no-architectures": lambda path: change_config(
        write_a2d_qwen3(path, seed=65), without=["architectures", "layer_types"]
    ),
    "a2d_qwen2-tied": lambda path: write_a2d_qwen2(path, seed=66),
    "a2d_qwen2-untied": lambda path: write_a2d_qwen2(path, tied=False, seed=67),
    "a2d_qwen2-ungrouped-heads": lambda path: write_a2d_qwen2(
        path, num_key_value_heads=4, seed=68
    ),
    "a2d_llama-tied": lambda path: write_a2d_llama(path, seed=69),
    "a2d_llama-untied": lambda path: write_a2d_llama(path, tied=False, seed=70),
    "a2d_llama-plain-rope": lambda path: change_config(
        write_a2d_llama(path, seed=71), {"rope_scaling": None}
    ),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
FLAGS = {"moe": LLADA_MOE_FLAGS, "diffullama": DIFFULLAMA_FLAGS}
"""Launch flags by the first word of a variant's name."""

HALF_VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llada-half": lambda path: write_llada(path, seed=41, dtype=torch.bfloat16),
    "dream-half": lambda path: write_dream(path, seed=42, dtype=torch.bfloat16),
    "moe-half": lambda path: write_llada_moe(path, seed=43, dtype=torch.bfloat16),
    "diffullama-half": lambda path: write_diffullama(
        path, seed=44, dtype=torch.bfloat16
    ),
    "a2d_qwen3-half": lambda path: write_a2d_qwen3(path, seed=45, dtype=torch.bfloat16),
}
"""Checkpoints in bfloat16, in which the server computes too, without a flag."""

BATCH_LENS = [[33], [1], [8, 8, 8], [1, 2], [5, 40, 3], [64, 64], [9, 1, 130, 17, 2]]
BATCH_LENS += [[3, 50, 50, 7, 19, 1, 88]]


def without_a_tensor(path: Path) -> Path:
    return change_tensors(write_llada(path, seed=19), lambda t: t.pop(_DOWN))


def without_a_piece(path: Path) -> Path:
    return change_tensors(write_llada(path, seed=30), lambda t: t.pop(_KEY))


def without_an_experts_tensor(path: Path) -> Path:
    return change_tensors(write_llada_moe(path, seed=31), lambda t: t.pop(_EXPERT))


def with_another_expert(path: Path) -> Path:
    extra = {"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}
    return change_tensors(write_llada_moe(path, seed=32), lambda t: t.update(extra))


def with_an_unknown_tensor(path: Path) -> Path:
    extra = {"model.transformer.blocks.0.router.weight": torch.zeros(4, 4)}
    return change_tensors(write_llada(path, seed=20), lambda t: t.update(extra))


_DOWN = "model.transformer.blocks.1.ff_out.weight"
_KEY = "model.transformer.blocks.1.k_proj.weight"
_EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


BROKEN: dict[str, Callable[[Path], Path]] = {
    "lacks": without_a_tensor,
    "unknown": with_an_unknown_tensor,
    "lacks-a-piece": without_a_piece,
    "moe-lacks": without_an_experts_tensor,
    "moe-unknown": with_another_expert,
    "dream-too-few-heads": lambda path: change_config(
        write_dream(path, seed=54), {"num_key_value_heads": 1}
    ),
    "moe-narrow-experts": lambda path: change_config(
        write_llada_moe(path, seed=55), {"expert_intermediate_size": 16}
    ),
    "dream-tied-other-head": lambda path: change_config(
        write_dream(path, seed=56), {"tie_word_embeddings": True}
    ),
    "llada-untied-no-head": lambda path: remove_head(write_llada(path, seed=57)),
    "illada-tied-other-head": lambda path: change_config(
        write_illada(path, tied=False, seed=73), without=["tie_word_embeddings"]
    ),
    "a2d_qwen3-untied-no-head": lambda path: change_config(
        write_a2d_qwen3(path, seed=58), {"tie_word_embeddings": False}
    ),
    "a2d_qwen3-lacks-a-norm": lambda path: change_tensors(
        write_a2d_qwen3(path, seed=59),
        lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"),
    ),
    "a2d_qwen2-as-llama": lambda path: change_config(
        write_a2d_qwen2(path, seed=72),
        {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"},
        without=["sliding_window", "layer_types"],
    ),
}


def random_batches(seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [[rng.choices(range(300), k=n) for n in lens] for lens in BATCH_LENS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    written = VARIANTS | BROKEN | HALF_VARIANTS
    return {name: write(root / name) for name, write in written.items()}


@pytest.fixture(scope="module")
def outcomes(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Our logits of every checkpoint and batch. One process computes them all."""
    folder = tmp_path_factory.mktemp("logits")
    jobs = [
        (str(path), FLAGS.get(name.split("-")[0], ()), random_batches(seed))
        for seed, (name, path) in enumerate(checkpoints.items())
    ]
    torch.save(jobs, folder / "job.pt")
    run_module("helpers.run_logits", folder / "job.pt", folder / "out.pt")
    return dict(zip(checkpoints, torch.load(folder / "out.pt"), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_reference(
    variant: str,
    checkpoints: dict[str, Path],
    outcomes: dict[str, dict[str, Any]],
) -> None:
    reference = load(checkpoints[variant])
    batches = random_batches(list(VARIANTS).index(variant))
    for batch, ours in zip(batches, outcomes[variant]["logits"], strict=True):
        for ids, found in zip(batch, ours, strict=True):
            wanted = reference.raw_logits(torch.tensor(ids))
            assert found.shape == wanted.shape
            worst = (found - wanted).abs().max().item()
            assert worst < TOLERANCE, (variant, [len(x) for x in batch], worst)


@pytest.mark.skipif(
    not is_native(torch.bfloat16), reason="this processor would serve in float32"
)
@pytest.mark.parametrize("variant", HALF_VARIANTS)
def test_bfloat16_is_as_exact_as_transformers(
    variant: str,
    checkpoints: dict[str, Path],
    outcomes: dict[str, dict[str, Any]],
) -> None:
    """Both differ from float32 by the rounding of their own order. Neither is far off.

    The mean is compared: a single logit is a matter of luck, and a router that rounds
    otherwise chooses another expert.
    """
    path = checkpoints[variant]
    half, exact = load(path, dtype=torch.bfloat16), load(path)
    batches = random_batches(list(checkpoints).index(variant))
    ours_off, theirs_off = [], []
    for batch, ours in zip(batches, outcomes[variant]["logits"], strict=True):
        for ids, found in zip(batch, ours, strict=True):
            wanted = exact.raw_logits(torch.tensor(ids))
            theirs = half.raw_logits(torch.tensor(ids)).float()
            ours_off.append((found - wanted).abs().mean().item())
            theirs_off.append((theirs - wanted).abs().mean().item())
    assert 1e-4 < fmean(ours_off) < 1.25 * fmean(theirs_off) + 1e-3


def test_the_logits_differ_from_each_other(outcomes: dict[str, dict[str, Any]]) -> None:
    """The comparison above would prove nothing if all logits were alike."""
    for name in VARIANTS:
        assert outcomes[name]["logits"][0][0].std() > 0.5
    padded = outcomes["llada-padded-embedding"]["logits"][0][0]
    assert padded.shape == (33, 320)


@pytest.mark.parametrize(
    "variant",
    ["llada-grouped-heads", "dream-grouped-heads", "diffullama-grouped-heads"],
)
def test_a_quantization_config_reaches_every_linear_layer(
    variant: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    """Quantized checkpoints list the layers they leave out by these names."""
    asked = outcomes[variant]["quantized"]
    for layer in range(2):
        for name, kind in {
            "self_attn.qkv_proj": "QKVParallelLinear",
            "self_attn.o_proj": "RowParallelLinear",
            "mlp.gate_up_proj": "MergedColumnParallelLinear",
            "mlp.down_proj": "RowParallelLinear",
        }.items():
            assert asked[f"model.layers.{layer}.{name}"] == kind
    assert asked["lm_head"] == "ParallelLMHead"


def test_a_quantization_config_reaches_the_experts_and_not_the_router(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    asked = outcomes["moe-grouped-heads"]["quantized"]
    for layer in range(2):
        assert asked[f"model.layers.{layer}.mlp.experts"] == "FusedMoE"
        assert asked[f"model.layers.{layer}.self_attn.qkv_proj"] == "QKVParallelLinear"
    assert not [name for name in asked if name.endswith(".gate")]


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("lacks", "layers.1.mlp.down_proj.weight"),
        # The checkpoint has the other pieces of the fused parameter.
        ("lacks-a-piece", "layers.1.self_attn.k_proj.weight"),
        ("moe-lacks", "layers.1.mlp.experts.5.up_proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(
    variant: str, name: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert name in outcomes[variant]["error"]


def test_an_unknown_tensor_is_named(outcomes: dict[str, dict[str, Any]]) -> None:
    """The error uses the checkpoint's name of the tensor, not ours."""
    error = outcomes["unknown"]["error"]
    assert "model.transformer.blocks.0.router.weight" in error
    error = outcomes["moe-unknown"]["error"]
    assert "model.layers.0.mlp.experts.8.up_proj.weight" in error


@pytest.mark.parametrize(
    ("variant", "name", "reason"),
    [
        # SGLang's loaders would take a part of such a tensor without a word.
        ("dream-too-few-heads", "layers.0.self_attn.k_proj.", "expects [16"),
        ("moe-narrow-experts", "layers.0.mlp.experts.0.", "config.json expects"),
        ("dream-tied-other-head", "lm_head.weight", "tie_word_embeddings"),
        ("llada-untied-no-head", "lm_head.weight", "lacks"),
        ("illada-tied-other-head", "lm_head.weight", "tie_word_embeddings"),
        ("a2d_qwen3-untied-no-head", "lm_head.weight", "lacks"),
        ("a2d_qwen3-lacks-a-norm", "layers.1.self_attn.q_norm.weight", "lacks"),
        ("a2d_qwen2-as-llama", "_proj.bias", "unknown tensor"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_named(
    variant: str, name: str, reason: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    error = outcomes[variant]["error"]
    assert name in error
    assert reason in error
    assert "\n" not in error
