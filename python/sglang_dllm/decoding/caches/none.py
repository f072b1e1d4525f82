"""``cache: none``: every forward computes the whole canvas. This is exact."""

from __future__ import annotations

from sglang_dllm.decoding.caches.base import (
    Batch,
    CacheOptions,
    CacheStrategy,
    NoCacheState,
    Windows,
    whole_canvases,
)
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.step import Step


class NoCache(CacheStrategy[CacheOptions, NoCacheState]):
    """Full windows only; the pool keeps no keys and values."""

    name = "none"
    keeps_kv = False

    def begin(
        self, batch: Batch, options: CacheOptions, algorithm_options: Options
    ) -> NoCacheState:
        return NoCacheState()

    def next_windows(self, batch: Batch, state: NoCacheState, step: Step) -> Windows:
        return whole_canvases(batch)
