"""Our model classes compute the reference's float32 logits, in ragged batches."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.models import load
from tiny_checkpoints import write_dream, write_llada

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
}
BATCH_LENS = [[33], [1], [8, 8, 8], [1, 2], [5, 40, 3], [64, 64], [9, 1, 130, 17, 2]]
BATCH_LENS += [[3, 50, 50, 7, 19, 1, 88]]


def without_a_tensor(path: Path) -> Path:
    return _edit(write_llada(path, seed=19), lambda t: t.pop(_DOWN))


def with_an_unknown_tensor(path: Path) -> Path:
    extra = {"model.transformer.blocks.0.router.weight": torch.zeros(4, 4)}
    return _edit(write_llada(path, seed=20), lambda t: t.update(extra))


_DOWN = "model.transformer.blocks.1.ff_out.weight"


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


BROKEN: dict[str, Callable[[Path], Path]] = {
    "lacks": without_a_tensor,
    "unknown": with_an_unknown_tensor,
}


def random_batches(seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [[rng.choices(range(300), k=n) for n in lens] for lens in BATCH_LENS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: write(root / name) for name, write in (VARIANTS | BROKEN).items()}


@pytest.fixture(scope="module")
def outcomes(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Ours, of every checkpoint and batch, from one process."""
    folder = tmp_path_factory.mktemp("logits")
    jobs = [
        (str(path), random_batches(seed))
        for seed, path in enumerate(checkpoints.values())
    ]
    torch.save(jobs, folder / "job.pt")
    script = Path(__file__).with_name("run_logits.py")
    command = [sys.executable, script, folder / "job.pt", folder / "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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


def test_the_logits_say_something(outcomes: dict[str, dict[str, Any]]) -> None:
    """Guards the comparison above against logits that are all alike."""
    for name in VARIANTS:
        assert outcomes[name]["logits"][0][0].std() > 0.5
    padded = outcomes["llada-padded-embedding"]["logits"][0][0]
    assert padded.shape == (33, 320)


@pytest.mark.parametrize("variant", ["llada-grouped-heads", "dream-grouped-heads"])
def test_a_quantization_config_reaches_every_linear_layer(
    variant: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    """By the names that quantized checkpoints list as left out."""
    asked = outcomes[variant]["quantized"]
    for layer in range(2):
        for name, kind in {
            "self_attn.qkv_proj": "QKVParallelLinear",
            "self_attn.o_proj": "RowParallelLinear",
            "mlp.gate_up_proj": "MergedColumnParallelLinear",
            "mlp.down_proj": "RowParallelLinear",
        }.items():
            assert asked[f"layers.{layer}.{name}"] == kind
    assert asked["lm_head"] == "ParallelLMHead"


def test_a_missing_tensor_is_named(outcomes: dict[str, dict[str, Any]]) -> None:
    assert "layers.1.mlp.down_proj.weight" in outcomes["lacks"]["error"]


def test_an_unknown_tensor_is_named(outcomes: dict[str, dict[str, Any]]) -> None:
    """By the checkpoint's name for it, not ours."""
    error = outcomes["unknown"]["error"]
    assert "model.transformer.blocks.0.router.weight" in error
