"""One interface to attention over canvases, with its cache of plans and its buckets.

A backend is a subclass in a file of its own, and one line in ``backends.BACKENDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from sglang_dllm.attention.plan import AttentionPlan, KVWrites, same_windows
from sglang_dllm.decoding.window import Window


@dataclass(frozen=True)
class LayerPool:
    """The keys and values of one layer in the KV pool of S slots.

    Attributes:
        keys, values: ``(S, H_kv, D)``.
        k_scale, v_scale: a stored number times its scale is the key or the value.
            None means 1.
    """

    keys: torch.Tensor
    values: torch.Tensor
    k_scale: float | None = None
    v_scale: float | None = None

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v ``(K, H_kv, D)`` to ``slots`` ``(K,)`` int64; both are only
        read."""
        for stored, x, scale in (
            (self.keys, k, self.k_scale),
            (self.values, v, self.v_scale),
        ):
            stored[slots] = (x if scale is None else x / scale).to(stored.dtype)


@dataclass(frozen=True)
class UpstreamLayerPool(LayerPool):
    """A layer of SGLang's pool, which writes in its own dtype and layout.

    Attributes:
        pool, layer: SGLang's ``KVCache`` and ``RadixAttention``.
    """

    pool: Any = None
    layer: Any = None

    @classmethod
    def of(cls, pool: Any, layer: Any) -> UpstreamLayerPool:
        keys, values = pool.get_kv_buffer(layer.layer_id)
        scales = layer.k_scale_float, layer.v_scale_float
        return cls(keys, values, *scales, pool, layer)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        layer = self.layer
        if layer.k_scale is not None:
            # The pool divides its arguments in place, and full windows read them later.
            k, v = k.clone(), v.clone()
        self.pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)


@dataclass
class PlannedForward:
    """A forward that is ready to run. Backends add what their kernels read."""

    kv_writes: KVWrites | None


Forward = TypeVar("Forward", bound=PlannedForward)


class CanvasAttention(ABC, Generic[Forward]):
    """Bidirectional attention of windows to their whole canvases.

    Call ``plan`` before the first layer of a forward and ``run`` in every layer. A
    forward of the same windows as the one before is not planned again.

    For CUDA graphs, call ``plan(plan, graph=True)``, run the forward once to compile
    its kernels, and capture it. From then on, call ``plan(plan, graph=True)`` before
    each replay. There is one set of fixed buffers for each bucket of B windows of L
    tokens. A replay reads the latest plan of its own bucket, so forwards of several
    buckets and eager ones may alternate. Nothing else may be planned between the plan
    of a bucket and its capture. ``plan`` itself cannot be captured, and q, k, v and the
    pools must stay where they were at the capture.
    """

    can_be_captured: ClassVar[bool] = True
    """True if ``new_bucket`` and ``fill_bucket`` are implemented."""

    def __init__(self, device: torch.device | str, max_canvas_len: int) -> None:
        """
        Args:
            max_canvas_len: the longest canvas of a CUDA graph, in tokens.
        """
        self.device = torch.device(device)
        self.max_canvas_len = max_canvas_len
        self._eager: tuple[Sequence[Window], Forward] | None = None
        self._buckets: dict[tuple[int, int], Forward] = {}
        self._forward: Forward | None = None

    @classmethod
    @abstractmethod
    def from_upstream(cls, backend: Any) -> CanvasAttention[Forward]:
        """A new one with the settings of SGLang's attention backend.

        Raises:
            ValueError: the backend has a setting that canvases cannot be served with.
        """

    @abstractmethod
    def plan_windows(self, plan: AttentionPlan) -> Forward:
        """Plan a forward that runs eagerly."""

    def new_bucket(self, num_windows: int, length: int, writes: KVWrites) -> Forward:
        """Fixed buffers for graphs of ``num_windows`` windows of ``length`` tokens.

        A window that is its whole canvas reads its keys from the pool like the others.

        Args:
            writes: the bucket's own; the base class fills it.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be captured")

    def fill_bucket(self, bucket: Forward, plan: AttentionPlan) -> None:
        """Put a plan into the buffers of its bucket."""
        raise NotImplementedError(f"{type(self).__name__} cannot be captured")

    @abstractmethod
    def attend(
        self,
        forward: Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        """``run`` after the fresh keys and values are written to the pool."""

    def plan(self, plan: AttentionPlan, graph: bool = False) -> None:
        """Prepare ``run`` for a forward.

        Args:
            graph: the forward is to be captured or replayed.

        Raises:
            ValueError: no graph can run these windows: they differ in length, one of
                them has no KV slots, or a canvas is too long.
        """
        self._forward = self._plan_graph(plan) if graph else self._plan_eager(plan)

    def use(self, bucket: Forward) -> None:
        """Let ``run`` read a bucket of the caller's own, which he fills himself."""
        self._forward = bucket

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        """The attention of one layer for the T planned tokens.

        The fresh keys and values of windows with KV slots are written to the pool
        first. A full window attends to its fresh keys and values, and a shorter one to
        those of its whole canvas in the pool.

        Args:
            q: ``(T, H, D)`` float.
            k, v: ``(T, H_kv, D)``, fresh, in the dtype of q; H a multiple of H_kv.
            pool: of this layer.
            scale: multiplies the dot products.

        Returns:
            ``(T, H, D)`` in the dtype of q.
        """
        forward = self._forward
        assert forward is not None, "run without a plan"
        if forward.kv_writes is not None:
            tokens, slots = forward.kv_writes
            pool.write(slots, k[tokens], v[tokens])
        return self.attend(forward, q, k, v, pool, scale)

    def _plan_eager(self, plan: AttentionPlan) -> Forward:
        if self._eager is None or not same_windows(plan.windows, self._eager[0]):
            # A plan that fails must not leave half of another one behind.
            self._eager = None
            self._eager = plan.windows, self.plan_windows(plan)
        return self._eager[1]

    def _plan_graph(self, plan: AttentionPlan) -> Forward:
        bucket = num_windows, length = self._bucket_of(plan)
        writes = plan.kv_writes
        assert writes is not None
        forward = self._buckets.get(bucket)
        if forward is None:
            own = KVWrites(slice(None), torch.zeros_like(writes.slots))
            forward = self._buckets[bucket] = self.new_bucket(num_windows, length, own)
        assert forward.kv_writes is not None
        forward.kv_writes.slots.copy_(writes.slots)
        self.fill_bucket(forward, plan)
        return forward

    def _bucket_of(self, plan: AttentionPlan) -> tuple[int, int]:
        lengths = sorted(set(plan.lens))
        if len(lengths) != 1:
            raise ValueError(f"a graph needs windows of one length, not {lengths}")
        slots_of(plan.windows)
        longest = max(window.canvas_len for window in plan.windows)
        if longest > self.max_canvas_len:
            raise ValueError(
                f"a graph has room for canvases of up to {self.max_canvas_len} tokens, "
                f"not for one of {longest}"
            )
        return len(plan.windows), lengths[0]


def slots_of(windows: Sequence[Window]) -> list[torch.Tensor]:
    """The KV slots of the whole canvas of each window.

    Raises:
        ValueError: a window has none.
    """
    slots = [window.kv_slots for window in windows if window.kv_slots is not None]
    if len(slots) != len(windows):
        raise ValueError("a window needs the keys and values of the rest of its canvas")
    return slots


def int32_slots(windows: Sequence[Window], device: torch.device) -> torch.Tensor:
    """``(K,)`` int32: the KV slots of all windows' canvases, back to back."""
    if not windows:
        return torch.zeros(0, dtype=torch.int32, device=device)
    return torch.cat(slots_of(windows)).to(torch.int32)
