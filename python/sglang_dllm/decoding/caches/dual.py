"""``cache: dual`` (Fast-dLLM, arXiv 2505.22618): the block alone."""

from __future__ import annotations

import torch

from sglang_dllm.decoding.caches.base import (
    Batch,
    CacheOptions,
    KVCache,
    RefreshState,
    Windows,
)
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.step import Step


class Dual(KVCache[CacheOptions, RefreshState]):
    """Refreshes at the first forward of a block; then computes the block."""

    name = "dual"

    def begin(
        self, batch: Batch, options: CacheOptions, algorithm_options: Options
    ) -> RefreshState:
        return RefreshState(refreshed_at=batch.one_row(-1))

    def choose(
        self, batch: Batch, state: RefreshState, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        prompt_len = batch.rows.prompt_len
        windows = Windows(prompt_len + step.start, prompt_len + step.end)
        return windows, state.refresh_at_new_span(step)
