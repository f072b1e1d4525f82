"""The length rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_dllm.decoding.lengths.append import Append
from sglang_dllm.decoding.lengths.base import LengthRule
from sglang_dllm.decoding.lengths.daedal import Daedal
from sglang_dllm.decoding.lengths.fixed import FIXED
from sglang_dllm.decoding.lengths.rho_eos import RhoEos

LENGTHS: Mapping[str, LengthRule[Any]] = MappingProxyType(
    {rule.name: rule for rule in (FIXED, Append(), RhoEos(), Daedal())}
)

READERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        key: tuple(
            name for name, rule in LENGTHS.items() if key in rule.options.model_fields
        )
        for one in LENGTHS.values()
        for key in one.options.model_fields
    }
)
"""Option of a request: the rules that read it."""
