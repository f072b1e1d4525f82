"""The captured steps of a server: which ones are declared, and how they are built."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_dllm.decoding.guard import is_device_fault
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.static_group import StaticGroup, StepShape
from sglang_dllm.runtime.graphs import WindowGraphs
from sglang_dllm.runtime.step_forward import WindowForward
from sglang_dllm.runtime.step_graphs import StepGraphs

logger = logging.getLogger(__name__)

ANSWER_LEN = 512
"""The longest answer of a captured step. Its tensors are as wide for any answer, which
costs little next to a forward."""

FEW = 128
"""A step with more tokens is captured for a quarter of the candidates, too: a head over
all tokens of many windows would be a good part of the forward."""

EXACT_LENGTHS = (128, 256, 512)
"""Tokens of a canvas without a cache, which is one window."""

EXACT_TOKENS = 2048
"""A forward of more tokens fills the device, and a graph would save nothing."""


def step_shapes(
    batch_sizes: Sequence[int], lengths: Sequence[int], has_cache: bool
) -> list[StepShape]:
    """The declared shapes: the one list of what is captured at start-up.

    Args:
        batch_sizes: numbers of canvases, ascending.
        lengths: tokens of a window, for canvases with a cache.
    """
    most = float("inf") if has_cache else EXACT_TOKENS
    return [
        StepShape(num, length, num * length // part)
        for num in batch_sizes
        for length in (lengths if has_cache else EXACT_LENGTHS)
        for part in ((4, 1) if num * length > FEW else (1,))
        if num * length <= most
    ]


def capture_steps(
    graphs: WindowGraphs,
    decoding: Decoding,
    progress: Callable[[list[StepShape]], Iterable[StepShape]] = iter,
) -> StepGraphs | None:
    """Capture every declared step, before the first request.

    Args:
        graphs: of the model's forwards; their attention and their capture are shared.
        decoding: the server's default, which most requests ask for.
        progress: goes through the shapes and shows how far it is.

    Returns:
        None if Python has to see each step, or if the memory does not suffice.
    """
    steps = new_step_graphs(graphs, decoding)
    if steps is None:
        return None
    limits, has_cache = graphs.limits, decoding.cache.keeps_kv
    shapes = step_shapes(limits.batch_sizes, limits.lengths, has_cache)
    began = time.perf_counter()
    try:
        # The largest first: the smaller ones then fit into its memory.
        for shape in progress(shapes[::-1]):
            steps.capture(shape)
    except Exception as error:  # there may be no memory left
        if is_device_fault(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        logger.error("No step is captured: %s", error)
        return None
    seconds = time.perf_counter() - began
    logger.info("%d steps are captured in %.1f s", len(shapes), seconds)
    return steps


def new_step_graphs(graphs: WindowGraphs, decoding: Decoding) -> StepGraphs | None:
    """As ``capture_steps``, with nothing captured yet."""
    device = graphs.attention.device
    try:
        static = StaticGroup(
            decoding,
            graphs.facts,
            device,
            num_canvases=max(graphs.limits.batch_sizes),
            answer_len=ANSWER_LEN,
            canvas_len=graphs.attention.max_canvas_len,
        )
    except Exception as error:  # the algorithm may be a third party's
        if is_device_fault(error):
            raise
        logger.info("No step is captured: %s", error)
        return None
    template = _template(device)
    return StepGraphs(
        static,
        partial(
            WindowForward, graphs.model, graphs.attention, graphs.backend, template
        ),
        partial(graphs.model.logits, forward_batch=template),
        graphs.facts.vocab_size,
        graphs.capture,
    )


def _template(device: torch.device) -> Any:
    """A forward batch that says which kind of forward a captured one is. Everything
    else that the model reads is in the plan."""
    one = torch.ones(1, dtype=torch.int64, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.DLLM_EXTEND,
        batch_size=1,
        input_ids=one,
        req_pool_indices=one,
        seq_lens=one,
        out_cache_loc=one,
        seq_lens_sum=1,
    )
