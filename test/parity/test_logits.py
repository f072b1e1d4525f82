"""Our model classes compute the reference's float32 logits, in ragged batches."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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

Logits = list[list[torch.Tensor]]


def random_batches(seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [[rng.choices(range(300), k=n) for n in lens] for lens in BATCH_LENS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: write(root / name) for name, write in VARIANTS.items()}


@pytest.fixture(scope="module")
def logits(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Logits]:
    """Ours, of every variant and batch, from one process."""
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
    return dict(zip(VARIANTS, torch.load(folder / "out.pt"), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_reference(
    variant: str, checkpoints: dict[str, Path], logits: dict[str, Logits]
) -> None:
    reference = load(checkpoints[variant])
    batches = random_batches(list(VARIANTS).index(variant))
    for batch, ours in zip(batches, logits[variant], strict=True):
        for ids, found in zip(batch, ours, strict=True):
            wanted = reference.raw_logits(torch.tensor(ids))
            assert found.shape == wanted.shape
            worst = (found - wanted).abs().max().item()
            assert worst < TOLERANCE, (variant, [len(x) for x in batch], worst)


def test_the_variants_are_different_models(logits: dict[str, Logits]) -> None:
    """Guards the comparison above against logits that say nothing."""
    firsts = [logits[name][0][0] for name in VARIANTS]
    assert firsts[5].shape[1] == 320
    for one in firsts:
        assert one.std() > 0.5
