"""The rules of the length with `FastDLLM` against the loops that were published."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from reference.length_loops import daedal, rho_eos
from reference.lengths import Answer, run_with_length
from reference.memory import TokenModel
from reference.script import EOS, MASK, VOCAB

PROMPT = [1, 2, 3]


class Ending:
    """Random logits of a text of about `length` tokens, EOS behind it.

    It never predicts a mask, as no trained model does. The more of the canvas is
    committed, the surer it is.
    """

    mask_id, eos_id, family = MASK, EOS, "llada"

    def __init__(self, seed: int, length: int, sharp: float = 9) -> None:
        self.seed, self.length, self.sharp = seed, length, sharp

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, 8) float32."""
        rng = torch.Generator().manual_seed(hash((self.seed, *ids.tolist())) % 2**31)
        logits = torch.randn(len(ids), VOCAB, generator=rng)
        logits *= torch.rand(len(ids), 1, generator=rng) * self.sharp
        behind = torch.arange(len(ids)) - len(PROMPT) - self.length
        logits[:, EOS] += 3 * behind.sign() + behind / 16
        logits[:, MASK] = -30
        return logits


def with_blocks_of(size: int, **others: Any) -> dict[str, Any]:
    return {"block_size": size, "threshold": 0.9, **others}


GIVEN: dict[str, list[dict[str, Any]]] = {
    "rho_eos": [
        {},
        {"step_schedule": "linear"},
        {"step_schedule": "const", "length_step": 5, "eos_check_tokens": 8},
        {"low_density": 0.1, "high_density": 0.15, "eos_check_tokens": 16},
    ],
    "daedal": [
        {},
        {"insert_confidence": 0.3, "eos_check_tokens": 16},
        {"insert_confidence": 0.4, "length_step": 3, "start_eos_confidence": 0.2},
        {
            "insert_confidence": 0.4,
            "eos_check_tokens": 9,
            "insert_eos_confidence": 0.99,
        },
    ],
}
NAMES = {
    "initial_length": "initial_gen_length",
    "length_step": "expansion_factor",
    "low_density": "low",
    "high_density": "high",
    "step_schedule": "scheduler",
    "start_eos_confidence": "eos_confidence_threshold",
    "insert_eos_confidence": "expand_eos_confidence_threshold",
    "insert_confidence": "low_conf_threshold",
}


def published(options: dict[str, Any]) -> dict[str, Any]:
    return {NAMES.get(key, key): value for key, value in options.items()}


@pytest.mark.parametrize("rule", ["rho_eos", "daedal"])
@pytest.mark.parametrize("initial", [5, 40, 64])
def test_equals_the_published_loop(rule: str, initial: int) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(24):
        options = {"initial_length": initial, **GIVEN[rule][seed % 4]}
        size, cap = (32, 16, 7)[seed % 3], (200, 120, 70)[seed // 3 % 3]
        model = Ending(seed, (0, 30, 60, 100)[seed % 4])
        loop = {"rho_eos": rho_eos, "daedal": daedal}[rule](
            model, PROMPT, cap, mask_id=MASK, eos_id=EOS, block_length=size,
            **published(options),
        )  # fmt: skip
        got = run_with_length(
            rule, options, "FastDLLM", model, PROMPT, cap, with_blocks_of(size),
            ignore_eos=True,
        )  # fmt: skip
        assert (got.ids, got.lengths) == (loop.ids, loop.lengths), seed
        pairs = list(zip(loop.lengths, loop.lengths[1:], strict=False))
        kinds["longer"] += any(a < b for a, b in pairs)
        kinds["shorter"] += any(a > b for a, b in pairs)
        kinds["at the cap"] += len(loop.ids) == cap
    assert kinds["longer"] > 5 and kinds["at the cap"]
    assert kinds["shorter"] > 5 or rule == "daedal"


def test_the_length_is_left_alone_after_64_forwards() -> None:
    model = Ending(3, 300, sharp=3)
    options = {"length_step": 1, "step_schedule": "const", "eos_check_tokens": 400}
    loop = rho_eos(
        model, PROMPT, 400, mask_id=MASK, eos_id=EOS, block_length=32,
        **published(options),
    )  # fmt: skip
    got = run_with_length(
        "rho_eos", options, "FastDLLM", model, PROMPT, 400, with_blocks_of(32),
        ignore_eos=True,
    )  # fmt: skip
    assert (got.ids, got.lengths) == (loop.ids, loop.lengths)
    assert len(set(loop.lengths[60:65])) > 1 == len(set(loop.lengths[64:]))
    assert loop.nfe > 70


def test_a_window_measures_nothing() -> None:
    """With a cache, only a forward over the whole canvas is asked."""
    model = TokenModel(Ending(3, 40), family_shift=False)
    facts: dict[str, Any] = {"family": "llada", "mask_id": MASK, "eos_id": EOS}

    def decode(cache: str) -> Answer:
        options = with_blocks_of(16, cache=cache)
        return run_with_length(
            "rho_eos", {}, "FastDLLM", model, PROMPT, 200, options,
            ignore_eos=True, **facts,
        )  # fmt: skip

    exact, cached = decode("none"), decode("dual")
    assert cached.tokens_computed < cached.nfe * (len(PROMPT) + max(cached.lengths))
    assert exact.tokens_cached == 0 < cached.tokens_cached
