"""Launches with ranks that cannot work are refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dllm.config.parallel_limits import check_timeouts, check_tp_size
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.configs import DreamConfig, LLaDAConfig, LLaDAMoEConfig

LLADA_8B = LLaDAConfig(d_model=4096, n_heads=32, mlp_hidden_size=12288)
DREAM_7B = DreamConfig(
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
)
LLADA_MOE = LLaDAMoEConfig()
ONE_KV_HEAD = DreamConfig(
    num_attention_heads=8, num_key_value_heads=1, intermediate_size=64
)


def check(config: Any, tp_size: int, ep_size: int = 1) -> None:
    check_tp_size(SimpleNamespace(tp_size=tp_size, ep_size=ep_size), config)


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (LLADA_8B, (1, 2, 4, 8, 16, 32)),
        (DREAM_7B, (1, 2, 4)),
        (LLADA_MOE, (1, 2, 4, 8, 16)),
        # All ranks repeat the only head of keys and values.
        (ONE_KV_HEAD, (1, 2, 4, 8)),
    ],
)
def test_what_fits(config: Any, fits: tuple[int, ...]) -> None:
    for tp_size in range(1, 40):
        if tp_size in fits:
            check(config, tp_size)
        else:
            with pytest.raises(ConfigError, match=f"--tp-size={tp_size} "):
                check(config, tp_size)


def test_the_message_names_field_and_allowed_values() -> None:
    with pytest.raises(ConfigError) as error:
        check(DREAM_7B, 7)
    assert str(error.value) == (
        "--tp-size=7 does not fit the checkpoint's num_key_value_heads=4; "
        "expected 1, 2 or 4"
    )


def test_the_intermediate_size_is_split_too() -> None:
    with pytest.raises(ConfigError, match="intermediate_size=12290"):
        check(LLaDAConfig(mlp_hidden_size=12290), 4)
    with pytest.raises(ConfigError, match="expert_intermediate_size=6;"):
        check(LLaDAMoEConfig(expert_intermediate_size=6), 4)


def test_expert_parallelism_splits_the_experts_first() -> None:
    check(LLaDAMoEConfig(expert_intermediate_size=6), 4, ep_size=2)


RUNNING, WAITING = "SGLANG_REQ_RUNNING_TIMEOUT", "SGLANG_REQ_WAITING_TIMEOUT"


@pytest.mark.parametrize("name", [RUNNING, WAITING])
def test_timeouts_by_the_clock_of_each_rank_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='2.5' does not work with --tp-si"):
        check_timeouts(2, {name: "2.5"}, lambda: False)
    check_timeouts(2, {name: "2.5"}, lambda: True)
    check_timeouts(1, {name: "2.5"}, lambda: False)
    for off in ("-1", "0", "no number"):
        check_timeouts(2, {name: off}, lambda: False)
