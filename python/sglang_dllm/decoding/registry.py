"""The algorithms by name: ours, and those that installed packages name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.algorithms.ada_block import AdaBlock
from sglang_dllm.decoding.algorithms.adaptive_parallel import AdaptiveParallel
from sglang_dllm.decoding.algorithms.credit import Credit
from sglang_dllm.decoding.algorithms.dream import Dream
from sglang_dllm.decoding.algorithms.entropy_threshold import EntropyThreshold
from sglang_dllm.decoding.algorithms.fast_dllm import FastDLLM
from sglang_dllm.decoding.algorithms.full_attn_multi_block import FullAttnMultiBlock
from sglang_dllm.decoding.algorithms.hierarchical import Hierarchical
from sglang_dllm.decoding.algorithms.llada import LLaDA
from sglang_dllm.decoding.algorithms.local_leap import LocalLeap

logger = logging.getLogger(__name__)

ENTRY_POINTS = "sglang_dllm.algorithms"
"""Entry-point group of third-party algorithms; the name is the algorithm's."""

OURS: tuple[type[Algorithm], ...] = (
    *(LLaDA, Dream, FastDLLM, EntropyThreshold, FullAttnMultiBlock),
    *(LocalLeap, AdaptiveParallel, Hierarchical, Credit, AdaBlock),
)


@lru_cache(maxsize=1)
def algorithms() -> Mapping[str, Algorithm]:
    """All algorithms by name. One that cannot be loaded is left out with a warning."""
    found = {kind.__name__: kind() for kind in OURS}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            logger.warning("algorithm %s of %s: name taken", point.name, point.value)
            continue
        try:
            found[point.name] = _load(point.name, point.load())
        except Exception as error:  # a third party's code
            logger.warning("algorithm %s of %s: %s", point.name, point.value, error)
    return MappingProxyType(found)


def _load(name: str, kind: object) -> Algorithm:
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise TypeError("not a sglang_dllm.decoding.algorithm.Algorithm")
    if kind.__name__ != name:
        raise TypeError(f"the class is called {kind.__name__}")
    return kind()
