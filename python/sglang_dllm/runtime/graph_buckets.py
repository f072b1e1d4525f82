"""The sizes for which CUDA graphs are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.models.facts import ModelFacts

SPAN_LENGTHS = (32, 64, 128)
"""Spans of the answer whose windows fill a bucket. A weight-bound forward takes as long
for some 165 tokens as for one (the ridge of an H200), so steps of 32 waste little."""

BATCH_SIZES = (1, 2, 4, 8, 16)
"""Windows of one graph, unless SGLang's flags say otherwise."""


def window_lengths(facts: ModelFacts) -> tuple[int, ...]:
    """The captured window lengths of a model, ascending, in tokens.

    The window of a span begins ``shift`` tokens before it, where the logits of its
    first position are. Without these tokens, the window of a block of 32 would take the
    bucket of 64.
    """
    return tuple(length + facts.family.shift for length in SPAN_LENGTHS)


class Bucket(NamedTuple):
    """The size of one graph: windows, tokens of each, and logits indices."""

    num_windows: int
    length: int
    num_logits: int


@dataclass(frozen=True)
class GraphLimits:
    """The captured batch sizes and window lengths, ascending.

    Attributes:
        batch_sizes: numbers of windows. None at all turns graphs off.
        lengths: tokens of a window.
    """

    batch_sizes: Sequence[int]
    lengths: Sequence[int]

    @classmethod
    def from_server_args(cls, server_args: Any, facts: ModelFacts) -> GraphLimits:
        """The limits that SGLang's ``--cuda-graph-*`` flags of the decode phase set. A
        denoising step is to these models what decoding is to others."""
        is_off = server_args.disable_decode_cuda_graph
        sizes = server_args.cuda_graph_bs_decode or BATCH_SIZES
        most = server_args.cuda_graph_max_bs_decode or max(sizes)
        batch_sizes = () if is_off else sorted({n for n in (*sizes, most) if n <= most})
        return cls(batch_sizes, window_lengths(facts))

    def fit(self, plan: AttentionPlan) -> tuple[int, int] | None:
        """Windows, and tokens of each, of the smallest bucket that holds a plan's
        windows; None where no bucket does."""
        num_windows = smallest(self.batch_sizes, len(plan.windows))
        length = smallest(self.lengths, max(plan.lens))
        if num_windows is None or length is None:
            return None
        return num_windows, length


def smallest(sizes: Sequence[int], number: int) -> int | None:
    """The smallest of ascending sizes that is not below a number, if there is one."""
    return next((size for size in sizes if size >= number), None)
