"""CUDA graphs for forwards whose windows all read the KV pool.

A full prefill has another length with each request, and it fills the device: it runs
eagerly. Windows are few tokens over many keys, and launching their kernels one by one
would take as long as running them. Such a forward runs in the graph of the smallest
bucket that holds it, padded (``runtime.graph_padding``).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_dllm.attention.backends import backend_of
from sglang_dllm.attention.base import CanvasAttention
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.guard import is_device_fault
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import power_of_two
from sglang_dllm.decoding.statistics import (
    HEAD_ELEMENTS,
    Statistic,
    fits_at_once,
    measure,
)
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graph_buckets import Bucket, GraphLimits
from sglang_dllm.runtime.graph_capture import Capture, CudaCapture
from sglang_dllm.runtime.graph_padding import PaddedWindows
from sglang_dllm.runtime.graph_staging import BucketGraph, StagedForward

logger = logging.getLogger(__name__)


def window_graphs(
    model_runner: Any,
    server_args: Any,
    facts: ModelFacts,
    capture: Capture | None = None,
) -> WindowGraphs | None:
    """The graphs of a model on a GPU; None where flags or the machine rule them out."""
    limits = GraphLimits.from_server_args(server_args, facts)
    upstream = model_runner.attn_backend
    if type(upstream).__name__ == "HybridAttnBackend":
        # It has a backend for prefill and one for decode. Our forwards are prefills.
        upstream = upstream.prefill_backend
    backend = backend_of(upstream)
    reason = (
        "the device is not a GPU"
        if model_runner.device != "cuda"
        else "a flag turns them off"
        if not limits.batch_sizes
        else f"{type(upstream).__name__} cannot be captured"
        if backend is None or not backend.attention_class.can_be_captured
        else "tensor parallelism is not captured"
        if server_args.tp_size > 1
        else None
    )
    if reason is not None or backend is None:
        logger.info("CUDA graphs are off: %s", reason)
        return None
    return WindowGraphs(
        model_runner.model,
        facts,
        backend.attention_of(upstream),
        upstream,
        limits,
        capture or CudaCapture(),
    )


class WindowGraphs:
    """The graphs of one model, each captured when it is first needed."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        attention: CanvasAttention[Any],
        backend: Any,
        limits: GraphLimits,
        capture: Capture,
    ) -> None:
        """
        Args:
            model: computes hidden states ``(N, H)``, and ``logits`` of those.
            attention: of ``backend``.
            backend: SGLang's attention backend, which the layers call.
            capture: a ``CudaCapture``, or a stand-in where there is no GPU.
        """
        self.model, self.facts = model, facts
        self.attention, self.backend = attention, backend
        self.limits, self.capture = limits, capture
        self._graphs: dict[Bucket, BucketGraph] = {}
        self._padded: PaddedWindows | None = None
        self._staged: StagedForward | None = None
        self._shared_logits: torch.Tensor | None = None
        self._has_failed = False
        logger.info(
            "CUDA graphs: up to %d windows of up to %d tokens; other forwards, full "
            "prefills among them, run eagerly",
            max(limits.batch_sizes),
            max(limits.lengths),
        )

    @property
    def buckets(self) -> dict[Bucket, tuple[Statistic, ...]]:
        """The captured buckets, and the statistics that their graphs compute."""
        return {bucket: graph.statistics for bucket, graph in self._graphs.items()}

    def accepts(self, plan: AttentionPlan) -> bool:
        """True if a graph can run a forward: every window reads the KV pool, a bucket
        holds them, and some logits are wanted."""
        return (
            not self._has_failed
            and len(plan.logits_indices) > 0
            and all(
                window.kv_slots is not None and not window.is_full
                for window in plan.windows
            )
            and self.limits.fit(plan) is not None
        )

    def run(
        self,
        plan: AttentionPlan,
        forward_batch: Any,
        statistics: tuple[Statistic, ...] = (),
    ) -> Logits:
        """Run one forward of a plan that is accepted.

        Args:
            forward_batch: with the plan's ``input_ids`` and ``positions``.
            statistics: to compute with it.

        Returns:
            The logits of the plan's ``logits_indices``. If a bucket has too
            many logits to hold at once, the head runs when it is asked for.
        """
        if self._staged is None or not self._staged.matches(plan, statistics):
            self.stage(plan, forward_batch, statistics)
        staged, self._staged = self._staged, None
        assert staged is not None
        graph, num = staged.graph, len(plan.logits_indices)
        if graph.is_new:
            graph = self._captured(staged)
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
        """Put the inputs of a forward into the buffers of its graph: all of ``run`` but
        the replay.

        Only the replay is left to a later ``run`` of the same windows, ids and first
        logits indices.
        """
        shape = self.limits.fit(plan)
        assert shape is not None, "no bucket holds the plan"
        num_windows, length = shape
        num_logits = power_of_two(len(plan.logits_indices))
        num_logits = min(num_logits, num_windows * length)
        bucket = Bucket(num_windows, length, num_logits)
        padded = self._pad(plan, shape, forward_batch.input_ids.device)
        graph = self._graph_of(bucket, padded, statistics, forward_batch)
        graph.fill(padded, forward_batch, plan.logits_indices)
        self._staged = StagedForward(graph, padded, plan, statistics)

    def _pad(
        self, plan: AttentionPlan, shape: tuple[int, int], device: torch.device
    ) -> PaddedWindows:
        """The padded windows of a plan, planned for attention. Nothing is done for
        those of the step before."""
        padded = self._padded
        if padded is None or not padded.matches(plan, shape):
            padded = PaddedWindows.of(plan, shape, device)
            self.attention.plan(padded.plan, graph=True)
            self._padded = padded
        return padded

    def _captured(self, staged: StagedForward) -> BucketGraph:
        # An eager forward may have been planned since.
        self.attention.plan(staged.padded.plan, graph=True)
        try:
            graph = staged.graph.captured(self.capture)
        except RuntimeError as error:  # there may be no memory left
            if is_device_fault(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            # This forward runs without a graph, and so do all later ones.
            logger.error("CUDA graphs are off from now on: %s", error)
            self._has_failed = True
            self._graphs.clear()
            return staged.graph
        self._graphs[graph.bucket] = graph
        return graph

    def _graph_of(
        self,
        bucket: Bucket,
        padded: PaddedWindows,
        wanted: tuple[Statistic, ...],
        forward_batch: Any,
    ) -> BucketGraph:
        """The graph of a bucket: a new one where it lacks a wanted statistic."""
        has_head = fits_at_once(bucket.num_logits, self.facts.vocab_size)
        there = self._graphs.get(bucket)
        known = there.statistics if there is not None else ()
        if there is not None and (not has_head or set(wanted) <= set(known)):
            return there
        union = tuple(sorted({*wanted, *known})) if has_head else ()
        return self._new_graph(bucket, padded, union, has_head, forward_batch)

    def _new_graph(
        self,
        bucket: Bucket,
        padded: PaddedWindows,
        statistics: tuple[Statistic, ...],
        has_head: bool,
        forward_batch: Any,
    ) -> BucketGraph:
        num_tokens = bucket.num_windows * bucket.length
        device = forward_batch.input_ids.device

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        ids, positions, logits_indices = map(
            zeros, (num_tokens, num_tokens, bucket.num_logits)
        )
        plan = replace(padded.plan, logits_indices=logits_indices)
        batch = CanvasForwardBatch.of(forward_batch, ids, positions, plan)

        def forward() -> tuple[torch.Tensor, ...]:
            with forward_context(ForwardContext(attn_backend=self.backend)):
                hidden = self.model.forward(ids, positions, batch).hidden_states
                if not has_head:
                    return (hidden,)
                logits = self.model.logits(hidden, batch)
            measured = (
                measure(logits, self.facts.mask_id, statistic)
                for statistic in statistics
            )
            return (self._share(logits), *chain.from_iterable(measured))

        inputs = ids, positions, logits_indices
        return BucketGraph(bucket, *inputs, statistics, has_head, forward)

    def _share(self, logits: torch.Tensor) -> torch.Tensor:
        """Copy logits to the buffer of all graphs. With an output of its own for each
        bucket they would take gigabytes. A step reads them before the next forward."""
        if self._shared_logits is None:
            self._shared_logits = logits.new_empty(HEAD_ELEMENTS)
        return self._shared_logits[: logits.numel()].view_as(logits).copy_(logits)
