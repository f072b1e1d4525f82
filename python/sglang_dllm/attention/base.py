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

    A CUDA graph has a bucket, fixed buffers for B windows of L tokens. ``use`` its
    bucket in the captured forward. ``fill_bucket`` puts a plan there before a replay,
    so forwards of several buckets and eager ones may alternate. It cannot be captured,
    and q, k, v and the pools must stay where they were at the capture.
    """

    can_be_captured: ClassVar[bool] = True
    """True if ``new_bucket`` and ``fill_bucket`` are implemented."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._eager: tuple[Sequence[Window], Forward] | None = None
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

    def new_bucket(
        self, num_windows: int, length: int, max_canvas_len: int, writes: KVWrites
    ) -> Forward:
        """Fixed buffers for graphs of ``num_windows`` windows of ``length`` tokens.

        A window that is its whole canvas reads its keys from the pool like the others.

        Args:
            max_canvas_len: the longest canvas that there is room for, in tokens.
            writes: where the captured forward's keys and values go. It belongs to the
                caller, who fills it.

        Raises:
            NotImplementedError: the backend cannot be captured.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be captured")

    def fill_bucket(self, bucket: Forward, plan: AttentionPlan) -> None:
        """Put a plan into the buffers of its bucket, all but its writes.

        Args:
            plan: B windows of L tokens, padding included.

        Raises:
            ValueError: a window has no KV slots.
        """
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

    def plan(self, plan: AttentionPlan) -> None:
        """Prepare ``run`` for an eager forward."""
        if self._eager is None or not same_windows(plan.windows, self._eager[0]):
            # A plan that fails must not leave half of another one behind.
            self._eager = None
            self._eager = plan.windows, self.plan_windows(plan)
        self._forward = self._eager[1]

    def use(self, bucket: Forward) -> None:
        """Let ``run`` read a bucket, in a capture."""
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
