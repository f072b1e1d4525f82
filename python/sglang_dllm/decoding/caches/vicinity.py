"""``cache: vicinity`` (dInfer, arXiv 2510.08666): the block and what surrounds it.

Source: dInfer ``VicinityCacheIteration``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_dllm.decoding.caches.base import (
    Batch,
    CacheOptions,
    KVCache,
    RefreshState,
    Windows,
)
from sglang_dllm.decoding.options import ForwardCount, Options, TokenCount
from sglang_dllm.decoding.step import Step


class VicinityOptions(CacheOptions):
    """
    Attributes:
        prefix_look, after_look: tokens computed before and behind the block.
        warmup: full forwards at the beginning, before the one that fills the cache.
    """

    prefix_look: TokenCount = 16
    after_look: TokenCount = 16
    warmup: ForwardCount = 4


@dataclass
class VicinityState(RefreshState):
    """
    Attributes:
        prefix_look, after_look: ``(R,)`` int64: the options.
        warm_at: ``(R,)`` int64: forwards of the canvas before the one that fills.
        filled_at: ``(R,)`` int64: start of the span at the forward that filled the
            cache.
    """

    prefix_look: torch.Tensor
    after_look: torch.Tensor
    warm_at: torch.Tensor
    filled_at: torch.Tensor


class Vicinity(KVCache[VicinityOptions, VicinityState]):
    """Warms up, fills the cache, then refreshes at the first forward of a block.

    The first ``warmup`` forwards are full. The next one is full too, and it fills the
    cache. dInfer tests for a new block only after the forward that fills the cache. It
    does not refresh in the first block. If the fill was in a later block, one more
    refresh follows after one window.
    """

    name = "vicinity"
    options = VicinityOptions

    def begin(
        self, batch: Batch, options: VicinityOptions, algorithm_options: Options
    ) -> VicinityState:
        return VicinityState(
            refreshed_at=batch.one_row(-1),
            prefix_look=batch.one_row(options.prefix_look),
            after_look=batch.one_row(options.after_look),
            # A canvas that was resized begins anew, and has run forwards already.
            warm_at=batch.rows.num_forwards + options.warmup,
            filled_at=batch.one_row(-1),
        )

    def choose(
        self, batch: Batch, state: VicinityState, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        prompt_len = batch.rows.prompt_len
        windows = Windows(
            prompt_len + step.start - state.prefix_look,
            prompt_len + step.end + state.after_look,
        )
        since_fill = batch.rows.num_forwards - state.warm_at
        state.filled_at = torch.where(since_fill == 0, step.start, state.filled_at)
        is_again = (since_fill == 2) & (step.start == state.filled_at)
        is_full = (
            (since_fill <= 0)
            | state.refresh_at_new_span(step)
            | (is_again & (step.start > 0))
        )
        return windows, is_full
