"""A CUDA graph's inputs, put in place before the graph runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_dllm.attention.plan import AttentionPlan, same_windows
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.runtime.graph_buckets import Bucket
from sglang_dllm.runtime.graph_capture import Capture, Run
from sglang_dllm.runtime.graph_padding import PaddedWindows


@dataclass(frozen=True)
class BucketGraph:
    """The graph of one bucket.

    Attributes:
        input_ids, positions, logits_indices: its fixed inputs.
        statistics: of the logits, computed in the graph.
        has_head: whether the logits are computed in the graph, too.
        replay: while the graph is new, the forward itself.
        is_new: not captured yet.
    """

    bucket: Bucket
    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor
    statistics: tuple[Statistic, ...]
    has_head: bool
    replay: Run
    is_new: bool = True

    def captured(self, capture: Capture) -> BucketGraph:
        """The same graph with the capture of its forward as replay.

        Raises:
            RuntimeError: the capture failed; there may be no memory left.
        """
        return replace(self, replay=capture(self.replay), is_new=False)

    def fill(
        self, padded: PaddedWindows, forward_batch: Any, logits_indices: torch.Tensor
    ) -> None:
        """Write the inputs of a forward; what pads them repeats the last entry.

        Args:
            forward_batch: with ``input_ids`` and ``positions`` ``(T,)`` int64.
            logits_indices: ``(N,)`` int64, into the T tokens.
        """
        self.input_ids.copy_(forward_batch.input_ids[padded.sources])
        self.positions.copy_(forward_batch.positions[padded.sources])
        wanted = padded.places[logits_indices[: self.bucket.num_logits]]
        self.logits_indices[: len(wanted)] = wanted
        self.logits_indices[len(wanted) :] = wanted[-1]


@dataclass(frozen=True)
class StagedForward:
    """A forward whose inputs are in the buffers of its graph."""

    graph: BucketGraph
    padded: PaddedWindows
    plan: AttentionPlan
    statistics: tuple[Statistic, ...]

    def matches(self, plan: AttentionPlan, statistics: tuple[Statistic, ...]) -> bool:
        """True if a plan is the staged one, up to logits indices cut off at the end."""
        return (
            statistics == self.statistics
            and same_windows(plan.windows, self.plan.windows)
            and _is_prefix(plan.logits_indices, self.plan.logits_indices)
        )


def _is_prefix(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """True if a tensor is a view of the first entries of another one. No value is
    compared, which would wait for the device."""
    return part.data_ptr() == whole.data_ptr() and len(part) <= len(whole)
