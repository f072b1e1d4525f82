"""CUDA graphs for forwards whose every row is a window.

Full prefills vary in length with every request and fill the device by themselves: they
run eagerly. Windows are few tokens over much memory, and launching their kernels one
by one would take as long as running them. A forward of B windows of up to W tokens
that decides N positions runs in the graph of the next greater bucket. What pads it
repeats what is there: the last row, the last position of a window, the last candidate;
equal values are written to equal slots, so that nothing has to be masked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_dllm.attention.base import same_rows
from sglang_dllm.attention.plan import AttentionPlan, forward_plan
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import power_of_two
from sglang_dllm.decoding.statistics import (
    HEAD_ELEMENTS,
    Statistic,
    fits_at_once,
    measure,
)
from sglang_dllm.decoding.window import Window
from sglang_dllm.models.facts import ModelFacts

logger = logging.getLogger(__name__)

WINDOWS = (32, 64, 128)
"""Window lengths that are captured. One more row is free until some 165 are in flight
(the ridge of an H200), so steps of 32 waste little."""

BATCH_SIZES = (1, 2, 4, 8, 16)

_ATTENTIONS = {
    "FlashInferAttnBackend": (
        "sglang_dllm.attention.flashinfer",
        "FlashInferCanvasAttention",
    ),
    "TritonAttnBackend": ("sglang_dllm.attention.triton", "TritonCanvasAttention"),
}
"""SGLang's backends that have fixed buffers to plan into, and ours for each. Named,
since FlashInfer cannot be imported everywhere."""

Run = Callable[[], tuple[torch.Tensor, ...]]
Capture = Callable[[Run], Run]
"""From a forward over fixed tensors to its replay; both return the same tensors."""


class Attention(Protocol):
    """What the graphs need of a backend: fixed buffers that a plan fills."""

    def plan(self, plan: AttentionPlan, graph: bool = False) -> None: ...


@dataclass(frozen=True)
class Limits:
    """Which buckets there are, ascending. No batch sizes: graphs are off."""

    batch_sizes: Sequence[int] = BATCH_SIZES
    windows: Sequence[int] = WINDOWS

    @classmethod
    def from_server_args(cls, server_args: Any) -> Limits:
        """As SGLang's ``--cuda-graph-*`` flags of the decode phase say: a denoising
        step is what decoding is for these models."""
        is_off = server_args.disable_decode_cuda_graph
        sizes = server_args.cuda_graph_bs_decode or BATCH_SIZES
        most = server_args.cuda_graph_max_bs_decode or max(sizes)
        return cls(() if is_off else sorted({n for n in (*sizes, most) if n <= most}))


def window_graphs(
    model_runner: Any,
    server_args: Any,
    facts: ModelFacts,
    capture: Capture | None = None,
) -> WindowGraphs | None:
    """The graphs of a model on a GPU; None where flags or the machine rule them out."""
    limits = Limits.from_server_args(server_args)
    backend = model_runner.attn_backend
    if type(backend).__name__ == "HybridAttnBackend":
        # One backend for prefill and one for decode; forwards of ours are prefills.
        backend = backend.prefill_backend
    attention = _ATTENTIONS.get(type(backend).__name__)
    reason = (
        "the device is not a GPU"
        if model_runner.device != "cuda"
        else "a flag turns them off"
        if not limits.batch_sizes
        else f"{type(backend).__name__} cannot be captured"
        if attention is None
        else "tensor parallelism is not captured"
        if server_args.tp_size > 1
        else None
    )
    if reason is not None or attention is None:
        logger.info("CUDA graphs are off: %s", reason)
        return None
    module, name = attention
    planned = getattr(import_module(module), name).of(backend)
    capture = capture or CudaCapture()
    return WindowGraphs(model_runner.model, facts, planned, backend, limits, capture)


def bucket_of(number: int, buckets: Sequence[int]) -> int | None:
    """The least bucket that holds a number, None where none does."""
    return next((bucket for bucket in buckets if bucket >= number), None)


def padded_plan(plan: AttentionPlan, num_rows: int, length: int) -> AttentionPlan:
    """``num_rows`` windows of ``length`` tokens, the last ones repeated."""
    rows = [
        replace(row, padding=length - (row.end - row.start)) for row in plan.windows
    ]
    rows += [rows[-1]] * (num_rows - len(rows))
    return AttentionPlan(rows, plan.logits_indices)


def padded_tokens(plan: AttentionPlan, num_rows: int, length: int) -> torch.Tensor:
    """``(num_rows * length,)`` int64: which token of the plan each padded one is."""
    index, first = [], 0
    for row in plan.windows:
        own = torch.arange(length).clamp(max=row.num_tokens - 1)
        index.append(first + own)
        first += row.num_tokens
    index += [index[-1]] * (num_rows - len(index))
    return torch.cat(index)


class Bucket(NamedTuple):
    """What a graph is captured for: rows, their tokens, and candidates."""

    num_rows: int
    length: int
    num_logits: int


@dataclass
class _Graph:
    """One bucket: what its replay reads, what it computes of the logits, the replay,
    which captures nothing while the graph is new."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor
    statistics: tuple[Statistic, ...]
    has_head: bool
    replay: Run
    is_new: bool = True


@dataclass(frozen=True)
class _Padded:
    """Windows of a plan as the bucket has them, kept while the same ones are computed.

    Attributes:
        rows: of the plan.
        shape: the bucket's rows, and tokens of each.
        plan: padded.
        tokens: ``(T',)`` int64: which token of the plan each padded one is.
        place: ``(T,)`` int64: where each token of the plan is among the padded ones.
    """

    rows: Sequence[Window]
    shape: tuple[int, int]
    plan: AttentionPlan
    tokens: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class _Staged:
    """A graph that has in place what it reads for a plan."""

    bucket: Bucket
    graph: _Graph
    plan: AttentionPlan
    statistics: tuple[Statistic, ...]

    def holds(self, plan: AttentionPlan, statistics: tuple[Statistic, ...]) -> bool:
        """Whether another plan is this one with the first of its candidates."""
        mine, others = self.plan.logits_indices, plan.logits_indices
        return (
            same_rows(plan.windows, self.plan.windows)
            and statistics == self.statistics
            and others.data_ptr() == mine.data_ptr()
            and len(others) <= len(mine)
        )


class WindowGraphs:
    """The graphs of one model, each captured when it is first needed.

    Args:
        model: gives hidden states ``(N, H)`` and their ``logits``.
        facts: of the model.
        attention: of the model's backend.
        backend: SGLang's attention backend, for its layers.
        capture: a ``CudaCapture``, or what stands in for it where there is no GPU.
    """

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        attention: Attention,
        backend: Any,
        limits: Limits,
        capture: Capture,
    ) -> None:
        self.model, self.facts = model, facts
        self.attention, self.backend = attention, backend
        self.limits, self.capture = limits, capture
        self._graphs: dict[Bucket, _Graph] = {}
        self._padded: _Padded | None = None
        self._staged: _Staged | None = None
        self._held: torch.Tensor | None = None
        self._has_failed = False
        logger.info(
            "CUDA graphs: up to %d windows of up to %d tokens; other forwards, full "
            "prefills among them, run eagerly",
            max(limits.batch_sizes),
            max(limits.windows),
        )

    def accepts(self, plan: AttentionPlan) -> bool:
        """Whether every row is a window, and a bucket holds them."""
        return (
            not self._has_failed
            and len(plan.logits_indices) > 0
            and all(
                row.kv_slots is not None and not row.is_full for row in plan.windows
            )
            and bucket_of(len(plan.windows), self.limits.batch_sizes) is not None
            and bucket_of(max(plan.lens), self.limits.windows) is not None
        )

    def run(
        self,
        plan: AttentionPlan,
        forward_batch: Any,
        statistics: tuple[Statistic, ...] = (),
    ) -> Logits:
        """One forward of a plan that is accepted.

        Args:
            forward_batch: with the plan's ``input_ids`` and ``positions``.
            statistics: to compute with it.

        Returns:
            Of the plan's N candidates. Where the bucket's logits are too many to be
            held at once, the head and the statistics are left for later.
        """
        if self._staged is None or not self._staged.holds(plan, statistics):
            self.stage(plan, forward_batch, statistics)
        staged, self._staged = self._staged, None
        assert staged is not None
        graph, num = staged.graph, len(plan.logits_indices)
        if graph.is_new:
            self._capture(staged.bucket, graph)
        out, *measured = (tensor[:num] for tensor in graph.replay())
        if not graph.has_head:
            head = partial(self.model.logits, forward_batch=forward_batch)
            return Logits.of_hidden(out, head, self.facts.vocab_size)
        pairs = zip(measured[::2], measured[1::2], strict=True)
        known = dict(zip(graph.statistics, pairs, strict=True))
        return Logits(num, self.facts.vocab_size, lambda rows: out[rows], known)

    def stage(
        self,
        plan: AttentionPlan,
        forward_batch: Any,
        statistics: tuple[Statistic, ...] = (),
    ) -> None:
        """All of ``run`` but the replay: put in place what the graph reads. Nothing is
        left to do for a ``run`` of the same windows and the first of the candidates,
        as long as the ids are the same."""
        num_rows = bucket_of(len(plan.windows), self.limits.batch_sizes)
        length = bucket_of(max(plan.lens), self.limits.windows)
        assert num_rows is not None and length is not None
        num = len(plan.logits_indices)
        num_logits = min(power_of_two(num), num_rows * length)
        bucket = Bucket(num_rows, length, num_logits)
        before = self._padded
        padded = self._pad(plan, bucket, forward_batch.input_ids.device)
        graph = self._graph_of(bucket, statistics, forward_batch)
        if graph.is_new or padded is not before:
            self.attention.plan(padded.plan, graph=True)
        graph.input_ids.copy_(forward_batch.input_ids[padded.tokens])
        graph.positions.copy_(forward_batch.positions[padded.tokens])
        wanted = padded.place[plan.logits_indices[:num_logits]]
        graph.logits_indices[:num] = wanted
        graph.logits_indices[num:] = wanted[-1]
        self._staged = _Staged(bucket, graph, plan, statistics)

    def _pad(
        self, plan: AttentionPlan, bucket: Bucket, device: torch.device
    ) -> _Padded:
        shape = bucket.num_rows, bucket.length
        padded = self._padded
        if (
            padded is None
            or padded.shape != shape
            or not same_rows(plan.windows, padded.rows)
        ):
            tokens = padded_tokens(plan, *shape).to(device, non_blocking=True)
            # Where a token is repeated, any of its places will do.
            place = torch.empty_like(tokens)
            place[tokens] = torch.arange(len(tokens), device=device)
            padded = _Padded(
                plan.windows, shape, padded_plan(plan, *shape), tokens, place
            )
            self._padded = padded
        return padded

    def _hold(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave logits where every graph leaves them. In outputs of their own, those of
        all buckets would be gigabytes; a step's are read before the next one's come."""
        if self._held is None:
            self._held = logits.new_empty(HEAD_ELEMENTS)
        return self._held[: logits.numel()].view_as(logits).copy_(logits)

    def _capture(self, bucket: Bucket, graph: _Graph) -> None:
        try:
            graph.replay, graph.is_new = self.capture(graph.replay), False
            self._graphs[bucket] = graph
        except RuntimeError as error:  # no memory left, for one
            # This forward runs without a graph, and so do all that follow.
            logger.error("CUDA graphs are off from now on: %s", error)
            self._has_failed = True
            self._graphs.clear()

    def _graph_of(
        self, bucket: Bucket, wanted: tuple[Statistic, ...], forward_batch: Any
    ) -> _Graph:
        """The bucket's graph: a new one where it computes less than is wanted now."""
        has_head = fits_at_once(bucket.num_logits, self.facts.vocab_size)
        there = self._graphs.get(bucket)
        known = there.statistics if there is not None else ()
        if there is not None and (not has_head or set(wanted) <= set(known)):
            return there
        union = tuple(sorted({*wanted, *known})) if has_head else ()
        return self._new_graph(bucket, union, has_head, forward_batch)

    def _new_graph(
        self,
        bucket: Bucket,
        statistics: tuple[Statistic, ...],
        has_head: bool,
        forward_batch: Any,
    ) -> _Graph:
        num_tokens = bucket.num_rows * bucket.length
        device = forward_batch.input_ids.device

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        ids, positions, logits_indices = map(
            zeros, (num_tokens, num_tokens, bucket.num_logits)
        )
        batch = replace(forward_batch, input_ids=ids, positions=positions)

        def forward() -> tuple[torch.Tensor, ...]:
            assert self._padded is not None
            plan = AttentionPlan(self._padded.plan.windows, logits_indices)
            context = ForwardContext(attn_backend=self.backend)
            with forward_context(context), forward_plan(plan):
                hidden = self.model.forward(ids, positions, batch).hidden_states
                if not has_head:
                    return (hidden,)
                logits = self.model.logits(hidden, batch)
            measured = (
                measure(logits, self.facts.mask_id, statistic)
                for statistic in statistics
            )
            return (self._hold(logits), *chain.from_iterable(measured))

        return _Graph(ids, positions, logits_indices, statistics, has_head, forward)


class CudaCapture:
    """Captures forwards in CUDA graphs that share their memory: what one computes has
    been read before another one runs."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        # Kernels are compiled and chosen when they first run.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return out

        return replay
