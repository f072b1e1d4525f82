"""``cache: delayed`` (d3LLM, arXiv 2601.07568): a cached prefix that grows.

Source: d3LLM ``generate_multi_block_kv_cache``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, cast

import torch
from pydantic import Field

from sglang_dllm.decoding.caches.base import (
    Batch,
    CacheOptions,
    KVCache,
    Windows,
    whole_canvases,
)
from sglang_dllm.decoding.options import ForwardCount, Options
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import Family


class HasBlockSize(Protocol):
    """The options of an algorithm that ``delayed`` serves."""

    block_size: int


class DelayedOptions(CacheOptions):
    """
    Attributes:
        cache_delay_iter: forwards that a finished block waits for the cache.
        refresh_interval: every so many forwards, one computes the whole canvas.
    """

    cache_delay_iter: ForwardCount = 2
    refresh_interval: Annotated[
        int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")
    ] = 3


@dataclass
class DelayedState(TensorRows):
    """K blocks a canvas; block 0 is the prompt.

    Attributes:
        block_size, delay, interval: ``(R,)`` int64: the options.
        began_at: ``(R,)`` int64: forwards of the canvas before this state began, as a
            canvas that is resized begins anew.
        cached: ``(R,)`` int64: how many tokens of the canvas, from its start, are
            cached.
        done_at: ``(R, K)`` int64: the forward at which a block was found finished, -1
            before.
        is_cached: ``(R, K)`` bool.
    """

    block_size: torch.Tensor
    delay: torch.Tensor
    interval: torch.Tensor
    began_at: torch.Tensor
    cached: torch.Tensor
    done_at: torch.Tensor
    is_cached: torch.Tensor


class Delayed(KVCache[DelayedOptions, DelayedState]):
    """Caches finished blocks from the start of the canvas on, after a delay.

    A finished block joins the cached prefix ``cache_delay_iter`` forwards after it was
    found finished. Until then, and at every ``refresh_interval``-th forward, all is
    computed. d3LLM stores the keys of a block twice where two blocks become finished at
    once; here every position has one key.
    """

    name = "delayed"
    options = DelayedOptions

    def defaults(self, family: Family) -> Mapping[str, Any]:
        # d3LLM's evaluation scripts.
        if family.sampler_family == "Dream":
            return {"cache_delay_iter": 1, "refresh_interval": 10_000}
        return {}

    def begin(
        self, batch: Batch, options: DelayedOptions, algorithm_options: Options
    ) -> DelayedState:
        block_size = cast(HasBlockSize, algorithm_options).block_size
        num_blocks = 1 + -(-batch.max_answer_len // block_size)
        done_at = torch.full((1, num_blocks), -1, device=batch.device)
        done_at[:, 0] = 0
        return DelayedState(
            block_size=batch.one_row(block_size),
            delay=batch.one_row(options.cache_delay_iter),
            interval=batch.one_row(options.refresh_interval),
            began_at=batch.rows.num_forwards,
            cached=batch.one_row(0),
            done_at=done_at,
            is_cached=torch.zeros_like(done_at, dtype=torch.bool),
        )

    def choose(
        self, batch: Batch, state: DelayedState, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        rows, done_at = batch.rows, state.done_at
        index = torch.arange(done_at.shape[1], device=batch.device)
        prompt = rows.prompt_len[:, None]
        ends = torch.minimum(
            index * state.block_size[:, None], rows.answer_len[:, None]
        )
        ends = ends + prompt
        # A block holds masks unless the first mask is behind it. The walk ends at the
        # first block with masks, so nothing behind that block counts.
        is_finished = ends <= prompt + batch.first_masked()[:, None]
        now = (rows.num_forwards + 1 - state.began_at)[:, None]
        waited = torch.where(done_at < 0, 0, now - done_at)
        is_due = (waited >= state.delay[:, None]) | (ends <= state.cached[:, None])
        is_reached = is_finished
        if batch.facts.family.sampler_family == "LLaDA":
            # The walk also ends behind the first block that is not due.
            goes_on = torch.nn.functional.pad(is_due[:, :-1], (1, 0), value=True)
            is_reached = is_finished & (goes_on.long().cumprod(dim=1) > 0)
        done_at = torch.where(is_reached & (done_at < 0), now, done_at)
        joins = is_reached & is_due & ~state.is_cached
        is_cached = state.is_cached | joins
        waits = is_finished & (done_at >= 0) & ~is_cached
        start = state.cached
        joined = torch.where(joins, ends, 0).amax(dim=1)
        refreshes = waits.any(dim=1) | (now[:, 0] % state.interval == 0)
        state.done_at, state.is_cached = done_at, is_cached
        state.cached = torch.maximum(start, joined)
        is_full = (start == 0) | (~joins.any(dim=1) & refreshes)
        return Windows(start, whole_canvases(batch).end), is_full
