"""The captured steps of a server: which ones are declared, and how they are built."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sglang_dllm.decoding.guard import is_device_fault
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.static_group import StaticGroup, StepShape
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.graph_capture import Capture
from sglang_dllm.runtime.graph_grid import Bucket
from sglang_dllm.runtime.step_graphs import StepGraphs
from sglang_dllm.runtime.window_forward import ModelParts

logger = logging.getLogger(__name__)

ANSWER_LEN = 512
"""The longest answer of a captured step. Its tensors are as wide for any answer, which
costs little next to a forward."""

FEW = 128
"""A step with more tokens is captured for a quarter of the candidates, too: a head over
all tokens of many windows would be a good part of the forward."""


def step_shapes(buckets: Iterable[Bucket]) -> list[StepShape]:
    """The declared shapes of steps in some buckets."""
    return [
        StepShape(*bucket, bucket.num_tokens // part)
        for bucket in buckets
        for part in ((4, 1) if bucket.num_tokens > FEW else (1,))
    ]


def new_step_graphs(
    parts: ModelParts,
    facts: ModelFacts,
    decoding: Decoding,
    num_canvases: int,
    canvas_len: int,
    capture: Capture,
) -> StepGraphs | None:
    """Captures nothing yet; ``capture`` does, shape by shape.

    Args:
        decoding: the server's default, which most requests ask for.
        num_canvases, canvas_len: the most canvases, and tokens of one.

    Returns:
        None if Python has to see each of its steps.
    """
    try:
        static = StaticGroup(
            decoding,
            facts,
            parts.attention.device,
            num_canvases=num_canvases,
            answer_len=min(ANSWER_LEN, canvas_len),
            canvas_len=canvas_len,
        )
    except Exception as error:  # the algorithm may be a third party's
        if is_device_fault(error):
            raise
        logger.warning("Steps are not captured whole: %s", error)
        return None
    return StepGraphs(static, parts.head, facts.vocab_size, capture)
