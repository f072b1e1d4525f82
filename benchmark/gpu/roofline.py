"""The floor of one forward on a machine, and the arithmetic of measured steps.

The floor assumes perfect kernels without gaps. Weights, the context's keys and values
and the float32 logits pass through memory once, and other activations stay on the chip.
Every multiply-add runs at the machine's matrix rate. The floor is the longer of both
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LOGIT_BYTES = 4
"""The head's logits are float32 for weights of any dtype."""

TPFS = (9.91, 4.89)
"""Published tokens per forward of d3LLM-LLaDA and d3LLM-Dream on GSM8K. Random weights
have no useful TPF of their own, so a step time becomes tokens per second at these."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the transformer. Weights and cached values take ``dtype_bytes``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    dtype_bytes: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def block_params(self) -> int:
        """Parameters of all blocks without their norms."""
        kv_width = self.kv_heads * self.head_dim
        attention = 2 * self.hidden * (self.hidden + kv_width)
        return self.layers * (attention + 3 * self.hidden * self.ff)

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


LLADA_8B = ModelShape(32, 4096, 32, 32, 12288, 126464, 2)


@dataclass(frozen=True)
class Rates:
    """The rates of a machine: bytes and floating point operations a second."""

    bandwidth: float
    matrix_rate: float


@dataclass(frozen=True)
class Work:
    """One forward over equal canvases.

    Attributes:
        window: tokens computed of each canvas.
        context: tokens of each canvas, to which its window attends.
        logits: tokens of each canvas that go through the head.
        batch: canvases.
    """

    window: int
    context: int
    logits: float
    batch: int = 1


@dataclass(frozen=True)
class Floor:
    """Milliseconds of computing and of memory. Only the longer one counts."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)


def forward_flops(shape: ModelShape, work: Work) -> float:
    """2 operations per weight and token, 4 per key, token, layer and dimension."""
    token = 2 * shape.block_params + 4 * shape.layers * shape.hidden * work.context
    head = 2 * shape.head_params * work.logits
    return work.batch * (work.window * token + head)


def forward_bytes(shape: ModelShape, work: Work) -> float:
    """Weights once for the batch, and keys, values and logits of each canvas."""
    weights = (shape.block_params + shape.head_params) * shape.dtype_bytes
    logits = work.logits * shape.vocab * LOGIT_BYTES
    return weights + work.batch * (work.context * shape.kv_bytes + logits)


def floor_of(flops: float, num_bytes: float, rates: Rates) -> Floor:
    return Floor(flops / rates.matrix_rate * 1e3, num_bytes / rates.bandwidth * 1e3)


def forward_floor(shape: ModelShape, work: Work, rates: Rates) -> Floor:
    """The floor of one forward with its head."""
    return floor_of(forward_flops(shape, work), forward_bytes(shape, work), rates)


def attention_floor(shape: ModelShape, work: Work, rates: Rates) -> Floor:
    """The floor of one layer's attention. q, k, v and the output count once."""
    flops = 4 * shape.hidden * work.window * work.context * work.batch
    kv = work.context * shape.kv_bytes // shape.layers
    q_and_out = 2 * work.window * shape.hidden * shape.dtype_bytes
    return floor_of(flops, work.batch * (kv + q_and_out), rates)


def head_floor(shape: ModelShape, rows: int, rates: Rates) -> Floor:
    """The floor of the head on some rows, with its output in the weights' dtype."""
    size = shape.head_params + rows * (shape.vocab + shape.hidden)
    flops = 2 * shape.head_params * rows
    return floor_of(flops, size * shape.dtype_bytes, rates)


def tokens_per_second(step_ms: float, tpf: float, batch: int) -> float:
    """Tokens a second of a batch whose canvases commit ``tpf`` tokens a forward."""
    return batch * tpf / step_ms * 1e3


def step_times(
    short_s: Sequence[float], long_s: Sequence[float], short: int, long: int
) -> list[float]:
    """Milliseconds a forward, one value for each pair of runs.

    The difference of two runs cancels their common parts: the way through the server,
    the first forward and the last.

    Args:
        short_s, long_s: seconds of requests with ``short`` and ``long`` forwards.
    """
    extra = long - short
    if extra <= 0:
        raise ValueError(f"the long run has {long} forwards, the short one {short}")
    pairs = zip(short_s, long_s, strict=True)
    return [(more - less) / extra * 1e3 for less, more in pairs]


def median_of(values: Sequence[float]) -> float:
    """The median of five values or more."""
    if len(values) < 5:
        raise ValueError(f"a median of {len(values)} values; at least 5 are needed")
    return median(values)
