"""The CUDA graphs of a model: declared by a grid, and never captured for a request.

The forward of each bucket of the grid (``runtime.graph_grid``) is captured alone, for
batches of any algorithms, and with the steps of the server's default decoding
(``runtime.step_graphs``). Every other forward runs eagerly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel
from tqdm import tqdm

from sglang_dllm.attention.backends import backend_of
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.algorithms.dream import MEASURES
from sglang_dllm.decoding.algorithms.full_attn_multi_block import NEGATIVE_ENTROPY
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.guard import is_device_fault
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.statistics import MARGIN, PROBABILITY
from sglang_dllm.decoding.window import DUMMY_SLOT, Window
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.forward_graph import ForwardGraph
from sglang_dllm.runtime.graph_capture import Capture, CudaCapture
from sglang_dllm.runtime.graph_grid import Bucket, GraphGrid
from sglang_dllm.runtime.step_graphs import StepGraphs
from sglang_dllm.runtime.step_grid import new_step_graphs, step_shapes
from sglang_dllm.runtime.window_forward import (
    ModelParts,
    WindowForward,
    upstream_backend,
)

logger = logging.getLogger(__name__)


def why_no_graphs(model_runner: Any, server_args: Any) -> str | None:
    """Why a machine or a flag rules graphs out; None where nothing does."""
    upstream = upstream_backend(model_runner)
    backend = backend_of(upstream)
    if model_runner.device != "cuda":
        return "the device is not a GPU"
    if server_args.disable_decode_cuda_graph:
        return "a flag turns them off"
    if backend is None or not backend.attention_class.can_be_captured:
        return f"{type(upstream).__name__} cannot be captured"
    if server_args.tp_size > 1:
        return "tensor parallelism is not captured"
    return None


def model_graphs(
    model_runner: Any,
    server_args: Any,
    facts: ModelFacts,
    decoding: Decoding,
    capture: Capture | None = None,
) -> CanvasGraphs | None:
    """The graphs of a server, captured; None where there are none.

    Args:
        server_args: SGLang's flags.
        decoding: the server's default.
        capture: a ``CudaCapture`` unless another one is given.
    """
    reason = why_no_graphs(model_runner, server_args)
    if reason is not None:
        logger.info("CUDA graphs are off: %s", reason)
        return None
    pool = model_runner.token_to_kv_pool
    max_canvas_len = min(
        model_runner.model_config.context_len, model_runner.max_total_num_tokens
    )
    grid = GraphGrid.declared(
        server_args,
        facts.family,
        block_size=getattr(decoding.options, "block_size", None),
        max_canvas_len=max_canvas_len,
    )
    graphs = CanvasGraphs(
        ModelParts.of(model_runner),
        facts,
        grid,
        max_canvas_len,
        capture or CudaCapture(),
        has_exact_pool=pool.dtype == model_runner.dtype,
    )
    graphs.capture_grid(decoding, shows_progress=get_parallel().tp_rank == 0)
    return graphs


def compile_kernels(parts: ModelParts, facts: ModelFacts) -> None:
    """Run an eager forward, so that its kernels are compiled before the first request.

    It has a full window and one that reads the pool, and every statistic. Its keys and
    values go to the slot that no canvas owns.
    """
    device = parts.attention.device
    slots = torch.full((32,), DUMMY_SLOT, device=device)
    windows = [Window(0, 32, 32), Window(0, 16, 32, slots)]
    every = torch.arange(48, device=device)
    plan = AttentionPlan(windows, every)
    parts.attention.plan(plan)
    hidden = parts.hidden(torch.zeros_like(every), every % 32, plan)
    logits = Logits.of_hidden(hidden, parts.head, facts.vocab_size)
    for statistic in (PROBABILITY, MARGIN, NEGATIVE_ENTROPY, *MEASURES.values()):
        logits.measure(statistic, facts.mask_id)


@dataclass(frozen=True)
class Captured:
    """The forwards that are captured, for the gate.

    Attributes:
        grid: the declared ones.
        buckets: those of them that were captured.
        max_canvas_len: the longest canvas that they have room for, in tokens.
        has_exact_pool: whether the KV pool keeps keys and values as they were computed,
            and not in a smaller type.
    """

    grid: GraphGrid
    buckets: Container[Bucket]
    max_canvas_len: int
    has_exact_pool: bool

    def why_eager(self, canvases: Sequence[Canvas]) -> str | None:
        """The gate: why the next forward of canvases runs eagerly, None if it is
        captured. The reason is a label of the metric of launches."""
        if any(canvas.is_guided for canvas in canvases):
            # Its two windows would write to the same slots.
            return "guided"
        lens = [end - start for start, end in (canvas.window for canvas in canvases)]
        pairs = list(zip(lens, map(len, canvases), strict=True))
        if not self.has_exact_pool and any(a == b for a, b in pairs):
            # A full window attends to its own keys. A graph reads them in the pool.
            return "quantized_pool"
        if max(map(len, canvases)) > self.max_canvas_len:
            return "long_canvas"
        bucket = self.grid.fit(lens)
        if bucket is None:
            return "no_bucket"
        return None if bucket in self.buckets else "not_captured"


@dataclass
class CanvasGraphs:
    """The graphs of one model.

    Attributes:
        parts: of the model.
        grid: the declared buckets.
        max_canvas_len: the longest canvas of a graph, in tokens.
        capture: a ``CudaCapture``, or a stand-in where there is no GPU.
        has_exact_pool: as in ``Captured``.
        steps: whole steps of the default decoding; None before ``capture_grid``, and
            where the host has to see each of its steps.
    """

    parts: ModelParts
    facts: ModelFacts
    grid: GraphGrid
    max_canvas_len: int
    capture: Capture
    has_exact_pool: bool = True
    steps: StepGraphs | None = None
    _forwards: dict[Bucket, ForwardGraph] = field(default_factory=dict)
    _decoding: Decoding | None = None
    _shows_progress: bool = False
    _is_dropped: bool = False

    def capture_grid(
        self, decoding: Decoding | None, shows_progress: bool = False
    ) -> None:
        """Capture all that the grid declares, over fillers: canvases may be active.

        The largest come first: the smaller ones then fit into their memory. A graph for
        which the memory of the device is too small is left out, and runs eagerly.

        Args:
            decoding: whose steps are captured, too; None for forwards alone.
        """
        self.drop()
        self._is_dropped = False
        self._decoding, self._shows_progress = decoding, shows_progress
        begin, before = time.perf_counter(), self._free_bytes()
        compile_kernels(self.parts, self.facts)
        steps = (
            None
            if decoding is None
            else new_step_graphs(
                self.parts,
                self.facts,
                decoding,
                self.grid.max_windows,
                self.max_canvas_len,
                self.capture,
            )
        )
        num_failed = 0
        self.steps = steps
        for bucket in tqdm(
            self.grid.buckets[::-1],
            desc="Capturing CUDA graphs",
            disable=not shows_progress,
        ):
            forward = WindowForward(self.parts, bucket, self.max_canvas_len)
            num_failed += not self._captured(partial(self._capture, bucket, forward))
            if steps is None:
                continue
            for shape in step_shapes([bucket]):
                num_failed += not self._captured(partial(steps.capture, shape, forward))
        logger.info(
            "CUDA graphs: %d forwards and %d steps captured in %.1f s and %d MiB%s",
            len(self._forwards),
            0 if self.steps is None else len(self.steps.shapes),
            time.perf_counter() - begin,
            (before - self._free_bytes()) >> 20,
            f"; {num_failed} failed and run eagerly" if num_failed else "",
        )

    def drop(self) -> None:
        """Forget the captures, for example because the weights have moved."""
        self._forwards.clear()
        self.steps = None
        self._is_dropped = True
        if isinstance(self.capture, CudaCapture):
            self.capture.forget()

    def recapture(self) -> None:
        """Capture again what was dropped. Does nothing if nothing was."""
        if self._is_dropped:
            self.capture_grid(self._decoding, self._shows_progress)

    @property
    def buckets(self) -> list[Bucket]:
        """The captured forwards."""
        return list(self._forwards)

    def why_eager(self, canvases: Sequence[Canvas]) -> str | None:
        """As ``Captured.why_eager``."""
        captured = Captured(
            self.grid, self._forwards, self.max_canvas_len, self.has_exact_pool
        )
        return captured.why_eager(canvases)

    def launch(self, packed: PackedForward) -> torch.Tensor:
        """Replay a forward that the gate lets pass. The host does not wait.

        Returns:
            The hidden states ``(N, H)`` of ``packed.logits_indices``.
        """
        bucket = self.grid.fit(packed.lens)
        assert bucket is not None, "no bucket holds the forward"
        return self._forwards[bucket].run(packed)

    def launch_step(self, group: Group) -> bool:
        """Replay a whole step of canvases that the gate lets pass; False if no capture
        holds it, and nothing was started then."""
        return self.steps is not None and self.steps.launch(group)

    def _capture(self, bucket: Bucket, forward: WindowForward) -> None:
        self._forwards[bucket] = ForwardGraph(forward, self.capture)

    def _captured(self, capture: Callable[[], None]) -> bool:
        try:
            capture()
        # There may be no memory left, and a captured algorithm may be a third party's.
        except Exception as error:
            if is_device_fault(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            logger.error("A CUDA graph is not captured: %s", error)
            return False
        return True

    def _free_bytes(self) -> int:
        device = self.parts.attention.device
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
