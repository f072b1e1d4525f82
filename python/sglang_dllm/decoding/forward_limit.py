"""The rule of ``max_forwards``: the last forward of a canvas commits what is left.

That forward is full, every mask of the answer is a candidate, and every candidate is
accepted. The denoiser asks here at the three places where the rule has an effect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.selection import count
from sglang_dllm.decoding.step import Step


def is_last_forward(batch: CanvasBatch[Any, Any]) -> torch.Tensor | None:
    """``(R,)`` bool: whether ``max_forwards`` ends a canvas with the next forward.

    None where no request sets it, which saves the tensor operations.
    """
    if all(options.max_forwards is None for options in batch.options):
        return None
    return batch.rows.num_forwards + 1 >= batch.rows.max_forwards


def widen(batch: CanvasBatch[Any, Any], step: Step) -> Step:
    """The step with every mask as a candidate where the next forward is the last."""
    last = is_last_forward(batch)
    if last is None:
        return step
    candidates = torch.where(last[:, None], batch.rows.masked, step.candidates)
    return replace(step, candidates=candidates)


def accept_all(inputs: StepInputs[Any, Any], decision: Decision) -> torch.Tensor:
    """``(N,)`` bool: what is accepted, everything where this forward is the last.

    Notes on the batch which canvases got more than their algorithm accepted.
    """
    last = is_last_forward(inputs.batch)
    if last is None:
        return decision.accepted
    is_last = inputs.per_candidate(last)
    added = count(is_last & ~decision.accepted, inputs.canvas_index, len(inputs.batch))
    inputs.batch.note_cut_short(added > 0)
    return decision.accepted | is_last
