"""The algorithms by name: ours, and those that installed packages name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, TypeAlias

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
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.caches.registry import READERS as CACHE_READERS
from sglang_dllm.decoding.lengths.registry import READERS as LENGTH_READERS
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.statistics import check_statistics
from sglang_dllm.decoding.tensor_rows import TensorRows

logger = logging.getLogger(__name__)

AnyAlgorithm: TypeAlias = Algorithm[Any, Any]

ENTRY_POINTS = "sglang_dllm.algorithms"
"""Entry-point group of third-party algorithms; the name is the algorithm's."""

OURS: tuple[type[AnyAlgorithm], ...] = (
    *(LLaDA, Dream, FastDLLM, EntropyThreshold, FullAttnMultiBlock),
    *(LocalLeap, AdaptiveParallel, Hierarchical, Credit, AdaBlock),
)


@lru_cache(maxsize=1)
def algorithms() -> Mapping[str, AnyAlgorithm]:
    """All algorithms by name. One that cannot be loaded is left out with a warning."""
    found = {kind.__name__: kind() for kind in OURS}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            logger.warning("algorithm %s of %s: name taken", point.name, point.value)
            continue
        try:
            found[point.name] = load(point.name, point.load())
        except Exception as error:  # a third party's code
            logger.warning("algorithm %s of %s: %s", point.name, point.value, error)
    return MappingProxyType(found)


def load(name: str, kind: object) -> AnyAlgorithm:
    """An algorithm from outside, after a look at its declarations.

    Raises:
        TypeError: the class has another name, or a declaration is wrong.
    """
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise TypeError("not a sglang_dllm.decoding.algorithm.Algorithm")
    if kind.__name__ != name:
        raise TypeError(f"the class is called {kind.__name__}")
    algorithm = kind()
    _check_subclass("options", algorithm.options, Options)
    _check_subclass("state", algorithm.state, TensorRows)
    declared = set(inspect.get_annotations(algorithm.state))
    missing = declared - {field.name for field in fields(algorithm.state)}
    if missing:
        # Canvases that join would lose these tensors without a word.
        raise TypeError(f"state must be a dataclass; {min(missing)} is no field of it")
    for cache in algorithm.caches:
        if cache not in CACHES:
            raise TypeError(f"caches names {cache!r}; expected {', '.join(CACHES)}")
    check_statistics(algorithm.statistics)
    selectors = {"algorithm", "cache", *CACHE_READERS, "length", *LENGTH_READERS}
    taken = selectors & set(algorithm.options.model_fields)
    if taken:
        raise TypeError(f"options has {min(taken)}, which every request reads itself")
    has_blocks = "block_size" in algorithm.options.model_fields
    if "delayed" in algorithm.caches and not has_blocks:
        raise TypeError("the cache delayed needs an option block_size")
    return algorithm


def _check_subclass(name: str, kind: object, base: type) -> None:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f"{name} must be a subclass of {base.__name__}")
