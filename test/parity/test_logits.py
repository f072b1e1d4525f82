"""Our model classes compute the reference's float32 logits, in ragged batches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.other_process import run_module
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
}
"""Checkpoints in bfloat16, in which the server computes too, without a flag."""

BATCH_LENS = [[33], [1], [8, 8, 8], [1, 2], [5, 40, 3], [64, 64], [9, 1, 130, 17, 2]]
BATCH_LENS += [[3, 50, 50, 7, 19, 1, 88]]


def without_a_tensor(path: Path) -> Path:
    return _edit(write_llada(path, seed=19), lambda t: t.pop(_DOWN))


def without_a_piece(path: Path) -> Path:
    return _edit(write_llada(path, seed=30), lambda t: t.pop(_KEY))


def without_an_experts_tensor(path: Path) -> Path:
    return _edit(write_llada_moe(path, seed=31), lambda t: t.pop(_EXPERT))


def with_another_expert(path: Path) -> Path:
    extra = {"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}
    return _edit(write_llada_moe(path, seed=32), lambda t: t.update(extra))


def with_a_shared_expert(path: Path) -> Path:
    write_llada_moe(path, seed=33)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["shared_expert_intermediate_size"] = 32
    file.write_text(json.dumps(config))
    return path


def with_an_unknown_tensor(path: Path) -> Path:
    extra = {"model.transformer.blocks.0.router.weight": torch.zeros(4, 4)}
    return _edit(write_llada(path, seed=20), lambda t: t.update(extra))


_DOWN = "model.transformer.blocks.1.ff_out.weight"
_KEY = "model.transformer.blocks.1.k_proj.weight"
_EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


BROKEN: dict[str, Callable[[Path], Path]] = {
    "lacks": without_a_tensor,
    "unknown": with_an_unknown_tensor,
    "lacks-a-piece": without_a_piece,
    "moe-lacks": without_an_experts_tensor,
    "moe-unknown": with_another_expert,
    "moe-unsupported": with_a_shared_expert,
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


def test_an_unsupported_field_is_named(outcomes: dict[str, dict[str, Any]]) -> None:
    error = outcomes["moe-unsupported"]["error"]
    assert "shared_expert_intermediate_size=32" in error
