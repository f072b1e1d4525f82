"""The scoring methods by name. A request names one; a server's default never does."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_dllm.decoding.scoring.base import Scorer
from sglang_dllm.decoding.scoring.in_order import Chain, Confidence, Greedy
from sglang_dllm.decoding.scoring.monte_carlo import MonteCarlo
from sglang_dllm.models.facts import Family

METHODS: Mapping[str, Scorer[Any, Any]] = MappingProxyType(
    {
        "mc": MonteCarlo(),
        "chain": Chain(),
        "confidence": Confidence(),
        "greedy": Greedy(),
    }
)


def default_method(family: Family) -> str:
    """The published method of a family: Dream's or LLaDA's."""
    return "chain" if family.sampler_family == "Dream" else "mc"
