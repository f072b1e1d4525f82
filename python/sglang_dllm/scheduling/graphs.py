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
from importlib import import_module
from typing import Any, Protocol

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_dllm.decoding.statistics import fits_at_once
from sglang_dllm.forward_plan import ForwardPlan, forward_plan

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

Run = Callable[[], torch.Tensor]
Capture = Callable[[Run], Run]
"""From a forward over fixed tensors to its replay; both return the same tensor."""


class Attention(Protocol):
    """What the graphs need of a backend: fixed buffers that a plan fills."""

    def plan(self, plan: ForwardPlan, graph: bool = False) -> None: ...


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
    model_runner: Any, server_args: Any, capture: Capture | None = None
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
    return WindowGraphs(
        model_runner.model, planned, backend, limits, capture or CudaCapture()
    )


def bucket_of(number: int, buckets: Sequence[int]) -> int | None:
    """The least bucket that holds a number, None where none does."""
    return next((bucket for bucket in buckets if bucket >= number), None)


def padded_plan(plan: ForwardPlan, num_rows: int, length: int) -> ForwardPlan:
    """``num_rows`` windows of ``length`` tokens, the last ones repeated."""
    rows = [replace(row, padding=length - (row.end - row.start)) for row in plan.rows]
    rows += [rows[-1]] * (num_rows - len(rows))
    return ForwardPlan(rows, plan.logits_rows)


def padded_tokens(plan: ForwardPlan, num_rows: int, length: int) -> torch.Tensor:
    """``(num_rows * length,)`` int64: which token of the plan each padded one is."""
    index, first = [], 0
    for row in plan.rows:
        own = torch.arange(length).clamp(max=row.length - 1)
        index.append(first + own)
        first += row.length
    index += [index[-1]] * (num_rows - len(index))
    return torch.cat(index)


@dataclass
class _Graph:
    """One bucket: what its replay reads, and the replay."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_rows: torch.Tensor
    replay: Run


class WindowGraphs:
    """The graphs of one model, each captured when it is first needed.

    Args:
        model: gives hidden states ``(N, H)`` and their ``logits``.
        attention: of the model's backend.
        backend: SGLang's attention backend, for its layers.
        capture: a ``CudaCapture``, or what stands in for it where there is no GPU.
    """

    def __init__(
        self,
        model: Any,
        attention: Attention,
        backend: Any,
        limits: Limits,
        capture: Capture,
    ) -> None:
        self.model, self.attention, self.backend = model, attention, backend
        self.limits, self.capture = limits, capture
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._plan: ForwardPlan | None = None
        self._has_failed = False
        logger.info(
            "CUDA graphs: up to %d windows of up to %d tokens; other forwards, full "
            "prefills among them, run eagerly",
            max(limits.batch_sizes),
            max(limits.windows),
        )

    def accepts(self, plan: ForwardPlan) -> bool:
        """Whether every row is a window, and a bucket holds them."""
        return (
            not self._has_failed
            and len(plan.logits_rows) > 0
            and all(row.slots is not None and not row.is_full for row in plan.rows)
            and bucket_of(len(plan.rows), self.limits.batch_sizes) is not None
            and bucket_of(max(plan.lens), self.limits.windows) is not None
        )

    def run(self, plan: ForwardPlan, forward_batch: Any) -> tuple[torch.Tensor, bool]:
        """One forward of a plan that is accepted.

        Args:
            forward_batch: with the plan's ``input_ids`` and ``positions``.

        Returns:
            ``(N, V)`` logits of the plan's candidates and True; or where those are
            too many to be held at once ``(N, H)``, their hidden states, and False.
        """
        num_rows = bucket_of(len(plan.rows), self.limits.batch_sizes)
        length = bucket_of(max(plan.lens), self.limits.windows)
        assert num_rows is not None and length is not None
        num = len(plan.logits_rows)
        # Powers of two, so that few graphs serve all numbers of candidates.
        num_logits = min(1 << max(5, (num - 1).bit_length()), num_rows * length)
        device = forward_batch.input_ids.device
        tokens = padded_tokens(plan, num_rows, length).to(device, non_blocking=True)
        self._plan = padded_plan(plan, num_rows, length)
        self.attention.plan(self._plan, graph=True)
        key = (num_rows, length, num_logits)
        graph = self._graphs.get(key)
        is_new = graph is None
        if graph is None:
            graph = self._new_graph(key, forward_batch)
        graph.input_ids.copy_(forward_batch.input_ids[tokens])
        graph.positions.copy_(forward_batch.positions[tokens])
        # Where a token is repeated, any of its places will do.
        place = torch.empty_like(tokens)
        place[tokens] = torch.arange(len(tokens), device=device)
        wanted = place[plan.logits_rows]
        graph.logits_rows[:num] = wanted
        graph.logits_rows[num:] = wanted[-1]
        if is_new:
            self._capture(key, graph)
        out = graph.replay()[:num]
        return out, self._has_head(num_logits)

    def _capture(self, key: tuple[int, int, int], graph: _Graph) -> None:
        try:
            graph.replay = self.capture(graph.replay)
            self._graphs[key] = graph
        except RuntimeError as error:  # no memory left, for one
            # This forward runs without a graph, and so do all that follow.
            logger.error("CUDA graphs are off from now on: %s", error)
            self._has_failed = True
            self._graphs.clear()

    def _has_head(self, num_logits: int) -> bool:
        return fits_at_once(num_logits, self.model.config.vocab_size)

    def _new_graph(self, key: tuple[int, int, int], forward_batch: Any) -> _Graph:
        num_rows, length, num_logits = key
        device = forward_batch.input_ids.device

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        ids, positions, logits_rows = map(
            zeros, (num_rows * length, num_rows * length, num_logits)
        )
        batch = replace(forward_batch, input_ids=ids, positions=positions)

        def forward() -> torch.Tensor:
            assert self._plan is not None
            plan = ForwardPlan(self._plan.rows, logits_rows)
            context = ForwardContext(attn_backend=self.backend)
            with forward_context(context), forward_plan(plan):
                hidden = self.model.forward(ids, positions, batch).hidden_states
                if self._has_head(num_logits):
                    hidden = self.model.logits(hidden, batch)
            return hidden

        return _Graph(ids, positions, logits_rows, forward)


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

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
