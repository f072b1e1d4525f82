"""Cached canvases: which positions a forward recomputes, over the rest's old KV.

Full attention lets every token's keys and values depend on all tokens, so whatever is
not recomputed is an approximation. Sources: Fast-dLLM (``prefix``, ``dual``), d3LLM
``generate_multi_block_kv_cache`` (``delayed``), dInfer (``vicinity``).

Windows are ranges of the whole canvas, prompt included. Where the model predicts a
position from the row before it (``Family.shift``), a window begins one row early, as
in dInfer, so that no prediction is left without its row.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step, first_true
from sglang_dllm.models.facts import Family

Windows = tuple[torch.Tensor, torch.Tensor]

CACHES = ("none", "prefix", "dual", "delayed", "vicinity")

OPTIONS = {
    "cache_delay_iter": "delayed",
    "refresh_interval": "delayed",
    "prefix_look": "vicinity",
    "after_look": "vicinity",
    "warmup": "vicinity",
}
"""Option of a request: the strategy that reads it."""


def defaults(family: Family) -> dict[str, int]:
    """Of d3LLM's evaluation scripts, where they are not the options' own."""
    if family.sampler_family == "Dream":
        return {"cache_delay_iter": 1, "refresh_interval": 10_000}
    return {}


def begin(canvases: CanvasBatch) -> dict[str, torch.Tensor]:
    """What the strategies remember of canvases with nothing decoded.

    ``refreshed_at`` ``(R,)``: start of the span of the last full forward. Of
    ``delayed``, with K blocks: ``cached`` ``(R,)``, how much of the canvas from its
    start is cached; ``done_at`` ``(R, K + 1)``, the forward at which a block was found
    finished, -1 before; ``is_cached`` ``(R, K + 1)`` bool. Block 0 is the prompt.
    """
    state = {"refreshed_at": torch.full_like(canvases.answer_len, -1)}
    (options,) = canvases.options
    if options.cache == "delayed":
        num_blocks = 1 + -(-canvases.max_answer_len // options.block_size)
    else:
        num_blocks = 1
    done_at = torch.full((1, num_blocks), -1, device=canvases.device)
    done_at[:, 0] = 0
    state["cached"] = torch.zeros_like(canvases.answer_len)
    state["done_at"] = done_at
    state["is_cached"] = torch.zeros_like(done_at, dtype=torch.bool)
    return state


def plan(canvases: CanvasBatch, step: Step) -> Windows:
    """The half-open range of the canvas that each next forward recomputes.

    Returns:
        Two tensors ``(R,)`` int64: start and end.
    """
    whole_start = torch.zeros_like(canvases.answer_len)
    whole_end = canvases.prompt_len + canvases.answer_len
    kinds = {options.cache for options in canvases.options}
    if kinds == {"none"}:
        return whole_start, whole_end
    start, end = canvases.prompt_len + step.start, canvases.prompt_len + step.end
    refreshed_at = canvases.cache["refreshed_at"]
    is_full = step.start != refreshed_at
    window_start, window_end = start, whole_end
    if "dual" in kinds:
        window_end = torch.where(canvases.option_is("cache", "dual"), end, window_end)
    if "vicinity" in kinds:
        uses = canvases.option_is("cache", "vicinity")
        before = start - canvases.option("prefix_look", torch.int64)
        behind = end + canvases.option("after_look", torch.int64)
        warmup = canvases.option("warmup", torch.int64)
        window_start = torch.where(uses, before, window_start)
        window_end = torch.where(uses, behind, window_end)
        is_full = is_full | (uses & (canvases.num_forwards < warmup))
    if "delayed" in kinds:
        uses = canvases.option_is("cache", "delayed")
        delayed_start, refreshes = _plan_delayed(canvases, uses)
        window_start = torch.where(uses, delayed_start, window_start)
        is_full = torch.where(uses, refreshes, is_full)
    is_full = is_full | canvases.option_is("cache", "none")
    last = canvases.is_last_forward()
    if last is not None:
        is_full = is_full | last
    canvases.cache["refreshed_at"] = torch.where(is_full, step.start, refreshed_at)
    window_start = (window_start - canvases.facts.family.shift).clamp(min=0)
    return (
        torch.where(is_full, whole_start, window_start),
        torch.where(is_full, whole_end, torch.minimum(window_end, whole_end)),
    )


def _plan_delayed(canvases: CanvasBatch, uses: torch.Tensor) -> Windows:
    """Start of the window, and whether the forward is full, of d3LLM's delayed cache.

    A finished block joins the cached prefix ``cache_delay_iter`` forwards after it was
    found finished; until then, and at every ``refresh_interval``-th forward, all is
    recomputed. d3LLM's second copy of a block's keys, where two blocks become finished
    at once, is not reproduced.
    """
    cache = canvases.cache
    size = canvases.option("block_size", torch.int64)[:, None]
    index = torch.arange(cache["done_at"].shape[1], device=canvases.device)
    prompt = canvases.prompt_len[:, None]
    ends = torch.minimum(index * size, canvases.answer_len[:, None]) + prompt
    # A block holds masks unless the first one is behind it: for the walk, which ends
    # at the first such block, that is all that counts.
    first_masked = prompt + first_true(canvases.masked)[:, None]
    is_finished = ends <= first_masked
    now = (canvases.num_forwards + 1)[:, None]
    delay = canvases.option("cache_delay_iter", torch.int64)[:, None]
    done_at = cache["done_at"]
    waited = torch.where(done_at < 0, 0, now - done_at)
    is_due = (waited >= delay) | (ends <= cache["cached"][:, None])
    if canvases.facts.family.sampler_family == "LLaDA":
        # The walk also ends behind the first block that is not due.
        goes_on = torch.nn.functional.pad(is_due[:, :-1], (1, 0), value=True)
        is_reached = is_finished & (goes_on.long().cumprod(dim=1) > 0)
    else:
        is_reached = is_finished
    is_reached = is_reached & uses[:, None]
    done_at = torch.where(is_reached & (done_at < 0), now, done_at)
    joins = is_reached & is_due & ~cache["is_cached"]
    is_cached = cache["is_cached"] | joins
    waits = is_finished & (done_at >= 0) & ~is_cached
    start = cache["cached"]
    joined = torch.where(joins, ends, 0).amax(dim=1)
    interval = canvases.option("refresh_interval", torch.int64)
    refreshes = waits.any(dim=1) | (now[:, 0] % interval == 0)
    cache["done_at"], cache["is_cached"] = done_at, is_cached
    cache["cached"] = torch.maximum(start, joined)
    return start, (start == 0) | (~joins.any(dim=1) & refreshes)
