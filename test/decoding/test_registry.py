"""Declarations of algorithms from outside, checked when the package loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from helpers.third_party.left_to_right import LeftToRight, LeftToRightOptions
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.registry import OURS, load
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.decoding.tensor_rows import TensorRows


class NotADataclass(TensorRows):
    left: torch.Tensor


@dataclass
class Plain:
    left: torch.Tensor


class WithWarmup(Options):
    warmup: int = 7


def variant(**declared: Any) -> type[Algorithm[Any, Any]]:
    return type("LeftToRight", (LeftToRight,), declared)


def test_a_sound_algorithm_loads() -> None:
    assert load("LeftToRight", LeftToRight).options is LeftToRightOptions
    for kind in OURS:
        assert type(load(kind.__name__, kind)) is kind


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"options": dict}, "options must be a subclass of Options"),
        ({"options": None}, "options must be a subclass of Options"),
        ({"state": Plain}, "state must be a subclass of TensorRows"),
        ({"state": NotADataclass}, "left is no field of it"),
        ({"caches": ("none", "paged")}, "caches names 'paged'; expected none, prefix"),
        ({"statistics": ("entropy",)}, "statistics has 'entropy'"),
        ({"options": WithWarmup}, "options has warmup"),
        ({"caches": ("none", "delayed")}, "delayed needs an option block_size"),
    ],
)
def test_a_wrong_declaration_is_named(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load("LeftToRight", variant(**declared))


def test_a_wrong_class_is_named() -> None:
    with pytest.raises(TypeError, match="the class is called LeftToRight"):
        load("RightToLeft", LeftToRight)
    for other in (dict, "LeftToRight", None):
        with pytest.raises(TypeError, match="not a sglang_dllm"):
            load("LeftToRight", other)


@pytest.mark.parametrize("wrong", [("margins",), ("probability", "x")])
def test_a_statistic_is_checked_where_it_is_made(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="is no statistic; kinds are probability"):
        Statistic(*wrong)
