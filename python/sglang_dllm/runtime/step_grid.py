"""The captured steps of a server: which ones are declared, and how they are built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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


def step_shapes(batch_sizes: Sequence[int], lengths: Sequence[int]) -> list[StepShape]:
    """The declared shapes, by the windows of a forward and the tokens of a window."""
    return [
        StepShape(num, length, num * length // part)
        for num in batch_sizes
        for length in lengths
        for part in ((4, 1) if num * length > FEW else (1,))
    ]


def new_step_graphs(graphs: WindowGraphs, decoding: Decoding) -> StepGraphs | None:
    """Captures nothing yet; ``capture`` does, shape by shape.

    Args:
        graphs: of the model's forwards; their attention and their capture are shared.
        decoding: the server's default, which most requests ask for.

    Returns:
        None if Python has to see each of its steps.
    """
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
        logger.info("Steps are not captured whole: %s", error)
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
