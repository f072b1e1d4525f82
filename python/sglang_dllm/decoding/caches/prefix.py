"""``cache: prefix`` (Fast-dLLM, arXiv 2505.22618): from the block to the end."""

from __future__ import annotations

import torch

from sglang_dllm.decoding.caches.base import (
    Batch,
    CacheOptions,
    KVCache,
    RefreshState,
    Windows,
    whole_canvases,
)
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.step import Step


class Prefix(KVCache[CacheOptions, RefreshState]):
    """Refreshes at the first forward of a block; then computes from its start on."""

    name = "prefix"

    def begin(
        self, batch: Batch, options: CacheOptions, algorithm_options: Options
    ) -> RefreshState:
        return RefreshState(refreshed_at=batch.one_row(-1))

    def choose(
        self, batch: Batch, state: RefreshState, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        start = batch.rows.prompt_len + step.start
        windows = Windows(start, whole_canvases(batch).end)
        return windows, state.refresh_at_new_span(step)
