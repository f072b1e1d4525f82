"""Canvas attention on FlashInfer's prefill wrappers.

Full windows go to a ragged wrapper over fresh keys and values. Shorter windows go to a
paged wrapper over the pool, with pages of one token. Each wrapper is planned once per
shape, not once per layer or forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from sglang_dllm.attention.base import (
    CanvasAttention,
    LayerPool,
    PlannedForward,
    int32_slots,
    slots_of,
)
from sglang_dllm.attention.plan import AttentionPlan, KVWrites, Tokens, same_slots
from sglang_dllm.decoding.window import Window

_DTYPES = (torch.float16, torch.bfloat16)
_TILE = 128
"""Queries of the largest tile of FlashInfer's fa2 kernels."""


@dataclass(frozen=True)
class Settings:
    """The settings that all plans of a model share, per tensor-parallel rank.

    Attributes:
        kv_dtype: of the pool, fp8 or ``q_dtype``. Fresh k and v have ``q_dtype``.
        scale: multiplies the dot products.
        is_deterministic: the keys of a window are not split among programs, so that
            the order of their sum does not depend on the rest of the batch.
        full_backend, window_backend: FlashInfer's names of its implementations.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    is_deterministic: bool = False
    full_backend: str = "auto"
    window_backend: str = "fa2"


Shape = tuple[list[int], list[int]]
"""Queries and keys of each window."""


class _PlannedWrapper:
    """A wrapper of FlashInfer, and the shape and slots of its last plan."""

    def __init__(self, wrapper: Any, is_cuda: bool) -> None:
        self.wrapper = wrapper
        self._is_cuda = is_cuda
        self._shape: Shape | None = None
        self._slots: list[torch.Tensor] = []
        self._uploaded: Any = None
        # The wrapper copies all of this buffer to the device but may write only a part.
        # Programs without work read the rest as indices, which must not be garbage.
        wrapper._pin_memory_int_workspace_buffer.zero_()

    def matches(self, shape: Shape, slots: list[torch.Tensor]) -> bool:
        """True if the last plan was for this shape and the slots of these canvases."""
        return shape == self._shape and same_slots(slots, self._slots)

    def plan(
        self, shape: Shape, slots: list[torch.Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Call the wrapper's ``plan``, which does not wait for the device.

        The wrapper writes its schedule to one pinned buffer and queues a copy to the
        device. The next plan would overwrite the buffer before the copy has run, so it
        waits for the copy, which the wrapper does not do.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._shape = None
        self.wrapper.plan(*args, **kwargs)
        if self._is_cuda:
            self._uploaded = torch.cuda.Event()
            self._uploaded.record()
        self._shape, self._slots = shape, slots


@dataclass
class FlashInferForward(PlannedForward):
    """The tokens of each wrapper in one planned forward.

    Attributes:
        full: of full windows, which attend to fresh keys; None where there are none.
        in_pool: of windows that read the pool; None where there are none.
        paged: the wrapper of those.
    """

    full: Tokens | None
    in_pool: Tokens | None
    paged: _PlannedWrapper


class FlashInferCanvasAttention(CanvasAttention[FlashInferForward]):
    """A bucket of B windows takes 8 MiB and ``4 * B * max_canvas_len`` bytes."""

    def __init__(
        self,
        workspace: torch.Tensor,
        settings: Settings,
        ragged_wrapper: Callable[..., Any] | None = None,
        paged_wrapper: Callable[..., Any] | None = None,
    ) -> None:
        """
        Args:
            workspace: uint8 on the model's device, for FlashInfer's partial results.
                Any wrapper that runs on the same stream may share it.
            ragged_wrapper, paged_wrapper: FlashInfer's classes, or others with their
                contract.

        Raises:
            ValueError: FlashInfer does not compute in the dtype.
        """
        super().__init__(workspace.device)
        if settings.q_dtype not in _DTYPES:
            raise ValueError(
                f"FlashInfer computes in float16 or bfloat16, not {settings.q_dtype}; "
                "choose --dtype bfloat16 or --attention-backend triton"
            )
        if ragged_wrapper is None or paged_wrapper is None:
            from flashinfer import (
                BatchPrefillWithPagedKVCacheWrapper,
                BatchPrefillWithRaggedKVCacheWrapper,
            )

            ragged_wrapper = ragged_wrapper or BatchPrefillWithRaggedKVCacheWrapper
            paged_wrapper = paged_wrapper or BatchPrefillWithPagedKVCacheWrapper
        self.settings = settings
        self._workspace = workspace
        self._paged_wrapper = paged_wrapper
        ragged = ragged_wrapper(workspace, "NHD", backend=settings.full_backend)
        self._ragged = _PlannedWrapper(ragged, workspace.is_cuda)
        self._paged = self._new_paged()

    @classmethod
    def from_upstream(cls, backend: Any) -> FlashInferCanvasAttention:
        if backend.prefill_uses_dequant_workspace:
            raise ValueError("fp4 KV caches do not serve full-attention dLLMs")
        updater = backend.indices_updater_prefill
        settings = Settings(
            num_heads=updater.num_qo_heads,
            num_kv_heads=updater.num_kv_heads,
            head_dim=updater.head_dim,
            q_dtype=updater.q_data_type,
            kv_dtype=updater.data_type,
            # All supported families have this scale. ``attend`` compares it.
            scale=updater.head_dim**-0.5,
            is_deterministic=backend.enable_deterministic,
            # "cutlass" on Blackwell. FlashInfer resolves "auto" at the first plan.
            full_backend=getattr(backend.prefill_wrapper_ragged, "_backend", "auto"),
            window_backend=backend.prefill_backend,
        )
        return cls(backend.workspace_buffer, settings)

    def plan_windows(self, plan: AttentionPlan) -> FlashInferForward:
        windows = plan.windows
        full = tokens_of(plan.lens, [w.is_full for w in windows], self.device)
        in_pool = tokens_of(plan.lens, [not w.is_full for w in windows], self.device)
        if full is not None:
            self._plan_ragged([w.num_tokens for w in windows if w.is_full])
        if in_pool is not None:
            self._plan_paged(
                self._paged,
                [w for w in windows if not w.is_full],
                self.settings.is_deterministic,
            )
        return FlashInferForward(plan.kv_writes, full, in_pool, self._paged)

    def new_bucket(
        self, num_windows: int, length: int, max_canvas_len: int, writes: KVWrites
    ) -> FlashInferForward:
        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        paged = self._new_paged(
            qo_indptr_buf=zeros(num_windows + 1),
            paged_kv_indptr_buf=zeros(num_windows + 1),
            paged_kv_indices_buf=zeros(num_windows * max_canvas_len),
            paged_kv_last_page_len_buf=zeros(num_windows),
        )
        return FlashInferForward(writes, None, slice(None), paged)

    def fill_bucket(self, bucket: FlashInferForward, plan: AttentionPlan) -> None:
        fits = self._split_fits(len(plan.windows), plan.lens[0])
        is_whole = self.settings.is_deterministic or not fits
        self._plan_paged(bucket.paged, plan.windows, is_whole)

    def attend(
        self,
        forward: FlashInferForward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        # FlashInfer takes the scale with the plan, before any layer is known.
        assert scale == self.settings.scale, "layers of different scales"
        q = q.contiguous()
        out = torch.empty_like(q)
        if forward.full is not None:
            tokens, ragged = forward.full, self._ragged.wrapper
            if isinstance(tokens, slice):
                ragged.run(q[tokens], k[tokens], v[tokens], out=out[tokens])
            else:
                out[tokens] = ragged.run(q[tokens], k[tokens], v[tokens])
        if forward.in_pool is not None:
            tokens, paged = forward.in_pool, forward.paged.wrapper
            pools = pool.keys.unsqueeze(1), pool.values.unsqueeze(1)
            scales = {"k_scale": pool.k_scale, "v_scale": pool.v_scale}
            if isinstance(tokens, slice):
                paged.run(q[tokens], pools, out=out[tokens], **scales)
            else:
                some = q[tokens]
                out[tokens] = paged.run(
                    some, pools, out=torch.empty_like(some), **scales
                )
        return out

    def _plan_ragged(self, lens: list[int]) -> None:
        shape = lens, lens
        if self._ragged.matches(shape, []):
            return
        at = indptr(lens)
        if self.settings.full_backend == "cutlass":
            # The other implementations take lengths from the host.
            at = at.to(self.device, non_blocking=True)
        common = self._common(self.settings.is_deterministic)
        self._ragged.plan(shape, [], at, at, **common)

    def _plan_paged(
        self, paged: _PlannedWrapper, windows: Sequence[Window], is_whole: bool
    ) -> None:
        """
        Args:
            is_whole: the keys of a window are not split among programs.
        """
        lens = [window.num_tokens for window in windows]
        shape = lens, [window.canvas_len for window in windows]
        slots = slots_of(windows)
        if paged.matches(shape, slots):
            return
        paged.plan(
            shape,
            slots,
            indptr(shape[0]),
            indptr(shape[1]),
            int32_slots(windows, self.device),
            torch.ones(len(windows), dtype=torch.int32),
            page_size=1,
            kv_data_type=self.settings.kv_dtype,
            **self._common(is_whole),
        )

    def _common(self, is_whole: bool) -> dict[str, Any]:
        """Arguments of both wrappers' ``plan``."""
        settings = self.settings
        return {
            "num_qo_heads": settings.num_heads,
            "num_kv_heads": settings.num_kv_heads,
            "head_dim_qk": settings.head_dim,
            "causal": False,
            "sm_scale": settings.scale,
            "q_data_type": settings.q_dtype,
            "disable_split_kv": is_whole,
        }

    def _new_paged(self, **buffers: torch.Tensor) -> _PlannedWrapper:
        wrapper = self._paged_wrapper(
            self._workspace,
            "NHD",
            backend=self.settings.window_backend,
            use_cuda_graph=bool(buffers),
            **buffers,
        )
        return _PlannedWrapper(wrapper, self._workspace.is_cuda)

    def _split_fits(self, num_windows: int, length: int) -> bool:
        """True if the workspace holds the partial results of a graph with split keys.

        For a graph, FlashInfer reserves fp32 partial results for as many tiles as any
        lengths could need, and its plan fails where they do not fit. A batch of that
        size fills the device without splitting.
        """
        settings = self.settings
        group = settings.num_heads // settings.num_kv_heads
        tiles = -(-num_windows * length * group // _TILE) + num_windows - 1
        if self._workspace.is_cuda:
            device = torch.cuda.get_device_properties(self.device)
            tiles = max(
                tiles, 2 * device.multi_processor_count // settings.num_kv_heads
            )
        partial = settings.num_heads * tiles * _TILE * (settings.head_dim + 1) * 4
        return partial <= self._workspace.numel()


def indptr(lens: Sequence[int]) -> torch.Tensor:
    """``(B + 1,)`` int32 on the CPU: where each of B windows begins, and the end."""
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)


def tokens_of(
    lens: Sequence[int], is_wanted: Sequence[bool], device: torch.device
) -> Tokens | None:
    """The tokens of the wanted windows: a slice where those are neighbours."""
    bounds = [0, *accumulate(lens)]
    wanted = [index for index, flag in enumerate(is_wanted) if flag]
    if not wanted:
        return None
    if wanted[-1] - wanted[0] + 1 == len(wanted):
        return slice(bounds[wanted[0]], bounds[wanted[-1] + 1])
    parts = [torch.arange(bounds[i], bounds[i + 1]) for i in wanted]
    return torch.cat(parts).to(device, non_blocking=True)
