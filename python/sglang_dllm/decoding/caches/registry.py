"""The cache strategies by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_dllm.decoding.caches.base import CacheStrategy
from sglang_dllm.decoding.caches.delayed import Delayed
from sglang_dllm.decoding.caches.dual import Dual
from sglang_dllm.decoding.caches.none import NoCache
from sglang_dllm.decoding.caches.prefix import Prefix
from sglang_dllm.decoding.caches.vicinity import Vicinity

CACHES: Mapping[str, CacheStrategy[Any, Any]] = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (NoCache(), Prefix(), Dual(), Delayed(), Vicinity())
    }
)

ALL_CACHES = tuple(CACHES)
"""The names, for algorithms that take every strategy."""

READERS: Mapping[str, str] = MappingProxyType(
    {key: name for name, cache in CACHES.items() for key in cache.options.model_fields}
)
"""Option of a request: the strategy that reads it."""

assert len(READERS) == sum(
    len(cache.options.model_fields) for cache in CACHES.values()
), "two strategies have an option of the same name"
