"""The grid: the sizes of forwards for which CUDA graphs are captured at start-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_dllm.models.facts import Family

SPAN_LENGTHS = (32, 64, 128)
"""Spans of the answer whose windows fill a bucket. A weight-bound forward takes as long
for some 165 tokens as for one (the ridge of an H200), so steps of 32 waste little."""

CANVAS_LENGTHS = (256, 384, 512)
"""Tokens of longer windows. Only whole canvases are that long."""

BUSY_TOKENS = 512
"""A forward of more tokens than this keeps the device busy for longer than the host
takes to launch its kernels one by one. So a whole canvas gains nothing from a graph
then. Many windows over cached keys still do: those keys are most of their work."""

BATCH_SIZES = (1, 2, 4, 8, 16)
"""Windows of one graph, unless SGLang's flags say otherwise."""


class Bucket(NamedTuple):
    """The size of a captured forward: R windows of L tokens."""

    num_windows: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.length


@dataclass(frozen=True)
class GraphGrid:
    """The declared buckets.

    Attributes:
        buckets: ascending by tokens. None at all: there are no graphs.
    """

    buckets: tuple[Bucket, ...]

    @classmethod
    def declared(
        cls,
        server_args: Any,
        family: Family,
        *,
        block_size: int | None,
        max_canvas_len: int,
    ) -> GraphGrid:
        """The grid of a server.

        The window of a span begins ``shift`` tokens before it, where the logits of its
        first position are. Without these tokens, the window of a block of 32 would take
        the bucket of 64.

        Args:
            server_args: SGLang's flags. ``--cuda-graph-*`` of the decode phase have
                their meaning: a denoising step is to these models what decoding is to
                others. No graph holds more windows than requests may run.
            block_size: of the server's default decoding, None where it has no blocks.
            max_canvas_len: the longest canvas that can be admitted, in tokens.
        """
        if server_args.disable_decode_cuda_graph:
            return cls(())
        given = server_args.cuda_graph_bs_decode or BATCH_SIZES
        most = server_args.cuda_graph_max_bs_decode or max(given)
        sizes = up_to(
            {n for n in (*given, most) if n <= most},
            server_args.max_running_requests or most,
        )
        spans = {*SPAN_LENGTHS, *([block_size] if block_size else [])}
        windows = {span + family.shift for span in spans if span <= max(SPAN_LENGTHS)}
        lengths = up_to({*windows, *CANVAS_LENGTHS}, max_canvas_len)
        buckets = [Bucket(num, length) for num in sizes for length in lengths]
        kept = [
            bucket
            for bucket in buckets
            if bucket.length <= max(windows) or bucket.num_tokens <= BUSY_TOKENS
        ]
        return cls(tuple(sorted(kept, key=lambda one: (one.num_tokens, one))))

    @property
    def max_windows(self) -> int:
        """The most windows of a bucket; 0 where there are no graphs."""
        return max((bucket.num_windows for bucket in self.buckets), default=0)

    def fit(self, lens: Sequence[int]) -> Bucket | None:
        """The bucket with the fewest tokens that holds windows of these lengths; None
        where no bucket does."""
        return next(
            (
                bucket
                for bucket in self.buckets
                if bucket.num_windows >= len(lens) and bucket.length >= max(lens)
            ),
            None,
        )


def up_to(sizes: Iterable[int], most: int) -> list[int]:
    """Ascending sizes, without those that the one before makes unnecessary: it holds
    ``most`` already."""
    found: list[int] = []
    for size in sorted(sizes):
        if not found or found[-1] < most:
            found.append(size)
    return found
