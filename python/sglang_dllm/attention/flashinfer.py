"""Canvas attention on FlashInfer's prefill wrappers.

Full rows go to a ragged wrapper over fresh keys and values, windows to a paged one
over the pool with pages of one token. Each is planned once per shape, not per layer
or forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dllm.attention.base import (
    Kept,
    Tokens,
    Write,
    graph_bucket,
    indptr,
    put,
    same_rows,
    slots_of,
    tokens_of,
)
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window

_DTYPES = (torch.float16, torch.bfloat16)
_TILE = 128
"""Queries of the greatest tile that FlashInfer's fa2 kernels take."""


@dataclass(frozen=True)
class Settings:
    """What every plan of a model's attention has in common, per tensor-parallel rank.

    Attributes:
        kv_dtype: of the pool, fp8 or ``q_dtype``; fresh k and v have ``q_dtype``.
        scale: multiplies the dot products.
        max_canvas_len: bounds the slots of one row under CUDA graphs.
        is_deterministic: no row's keys are split among programs, so that how they
            are summed does not depend on the rest of the batch.
        full_backend, window_backend: what FlashInfer calls its implementations.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    max_canvas_len: int
    is_deterministic: bool = False
    full_backend: str = "auto"
    window_backend: str = "fa2"


class _Planned:
    """A wrapper of FlashInfer, and the rows that it was last planned for."""

    def __init__(self, wrapper: Any, has_device: bool) -> None:
        self.wrapper = wrapper
        self._has_device = has_device
        self._shape: tuple[list[int], list[int]] | None = None
        self._slots: list[torch.Tensor] = []
        self._uploaded: Any = None

    def is_for(
        self, shape: tuple[list[int], list[int]], slots: list[torch.Tensor]
    ) -> bool:
        # The slots are held on to, so that no other tensor can become the same object.
        return shape == self._shape and all(
            a is b for a, b in zip(slots, self._slots, strict=True)
        )

    def plan(
        self,
        shape: tuple[list[int], list[int]],
        slots: list[torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The wrapper's ``plan``. The device is not asked for anything.

        The wrapper writes its schedule to one pinned buffer and copies it to the
        device behind the kernels that are queued there. The next plan must not
        overwrite the buffer before that, and the wrapper does not look.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._shape = None
        self.wrapper.plan(*args, **kwargs)
        if self._has_device:
            self._uploaded = torch.cuda.Event()
            self._uploaded.record()
        self._shape, self._slots = shape, slots


@dataclass
class _Forward:
    """What ``run`` does for one planned forward.

    Attributes:
        rows: for which; of a graph's bucket none are noted, they change with each plan.
        full, windows: the tokens of each kind of row, None where there is none.
        paged: the wrapper for windows.
    """

    rows: Sequence[Window]
    kept: Kept
    full: Tokens | None
    windows: Tokens | None
    paged: _Planned | None


class FlashInferCanvasAttention:
    """Bidirectional attention of canvases' windows, planned once per forward.

    ``plan`` before the first layer, then ``run`` in every layer.

    Under CUDA graphs: ``plan(plan, graph=True)``, run the forward once to warm up,
    capture it, and from then on ``plan(plan, graph=True)`` and replay. There is one set
    of static buffers per bucket (rows, window length), of 8 MiB and 4 bytes times rows
    times ``max_canvas_len``. A replay reads the slots and lengths of the latest plan of
    its own bucket, so forwards of several buckets and eager ones may alternate. Between
    planning a bucket and capturing it nothing else may be planned; ``plan`` itself
    cannot be captured; q, k, v and the pools must stay where they were at the capture.
    """

    def __init__(
        self,
        workspace: torch.Tensor,
        settings: Settings,
        ragged_wrapper: Callable[..., Any] | None = None,
        paged_wrapper: Callable[..., Any] | None = None,
    ) -> None:
        """
        Args:
            workspace: uint8 on the model's device, for FlashInfer's partial results;
                may be shared with any wrapper that runs on the same stream.
            ragged_wrapper, paged_wrapper: FlashInfer's classes, or others with their
                contract.
        """
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
        self._device = workspace.device
        self._paged_wrapper = paged_wrapper
        ragged = ragged_wrapper(workspace, "NHD", backend=settings.full_backend)
        self._ragged = _Planned(ragged, workspace.is_cuda)
        self._paged = self._new_paged()
        self._eager: _Forward | None = None
        self._buckets: dict[tuple[int, int], _Forward] = {}
        self._forward: _Forward | None = None

    @classmethod
    def of(cls, backend: Any) -> FlashInferCanvasAttention:
        """The one that belongs to SGLang's ``FlashInferAttnBackend``, made once."""
        found = getattr(backend, "canvas_attention", None)
        if found is None:
            found = backend.canvas_attention = cls._like(backend)
        return found

    @classmethod
    def _like(cls, backend: Any) -> FlashInferCanvasAttention:
        if backend.prefill_uses_dequant_workspace:
            raise ValueError("fp4 KV caches do not serve full-attention dLLMs")
        updater = backend.indices_updater_prefill
        settings = Settings(
            num_heads=updater.num_qo_heads,
            num_kv_heads=updater.num_kv_heads,
            head_dim=updater.head_dim,
            q_dtype=updater.q_data_type,
            kv_dtype=updater.data_type,
            # Of all supported families; the hook compares it with each layer's.
            scale=updater.head_dim**-0.5,
            max_canvas_len=backend.max_context_len,
            is_deterministic=backend.enable_deterministic,
            # "cutlass" on Blackwell; "auto" is resolved at the first plan.
            full_backend=getattr(backend.prefill_wrapper_ragged, "_backend", "auto"),
            window_backend=backend.prefill_backend,
        )
        return cls(backend.workspace_buffer, settings)

    def plan(self, plan: AttentionPlan, graph: bool = False) -> None:
        """Prepare ``run`` for a forward; nothing is done again for a shape at hand.

        Args:
            graph: the forward is captured, or replayed: every row is a window of one
                length over the pool. Rows that only pad the batch, and positions
                that only pad a window, repeat others.

        Raises:
            ValueError: such a graph cannot run these rows.
        """
        self._forward = self._plan_graph(plan) if graph else self._plan_eager(plan)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        write: Write | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        """One layer's attention of the planned tokens, as ``canvas.canvas_attention``.

        Args:
            q: ``(T, H, D)``, the plan's windows back to back.
            k, v: ``(T, H_kv, D)``, fresh, in the dtype of q.
            k_pool, v_pool: ``(S, H_kv, D)``, the layer's pool.
            write: puts kept keys and values there; by index where it is None.
            k_scale, v_scale: what the pool's numbers are multiplied with.

        Returns:
            ``(T, H, D)`` in the dtype of q.
        """
        forward = self._forward
        assert forward is not None, "run without a plan"
        q = q.contiguous()
        out = torch.empty_like(q)
        if forward.full is not None:
            # Before the write, which may change k and v (see planned.into_pool).
            full, ragged = forward.full, self._ragged.wrapper
            if isinstance(full, slice):
                ragged.run(q[full], k[full], v[full], out=out[full])
            else:
                out[full] = ragged.run(q[full], k[full], v[full])
        if forward.kept is not None:
            tokens, slots = forward.kept
            (write or put(k_pool, v_pool))(slots, k[tokens], v[tokens])
        if forward.windows is not None:
            assert forward.paged is not None
            windows, paged = forward.windows, forward.paged.wrapper
            pools = k_pool.unsqueeze(1), v_pool.unsqueeze(1)
            scales = {"k_scale": k_scale, "v_scale": v_scale}
            if isinstance(windows, slice):
                paged.run(q[windows], pools, out=out[windows], **scales)
            else:
                some = q[windows]
                out[windows] = paged.run(
                    some, pools, out=torch.empty_like(some), **scales
                )
        return out

    def _plan_eager(self, plan: AttentionPlan) -> _Forward:
        rows = plan.windows
        if self._eager is not None and same_rows(rows, self._eager.rows):
            return self._eager
        is_full = [row.is_full for row in rows]
        is_window = [not full for full in is_full]
        full = windows = None
        # Forgotten first: a plan that fails must not leave half of another one.
        self._eager = None
        if any(is_full):
            full = tokens_of(plan.lens, is_full, self._device)
            self._plan_full([row.num_tokens for row in rows if row.is_full])
        if any(is_window):
            windows = tokens_of(plan.lens, is_window, self._device)
            self._plan_windows(self._paged, [row for row in rows if not row.is_full])
        self._eager = _Forward(rows, plan.kept, full, windows, self._paged)
        return self._eager

    def _plan_graph(self, plan: AttentionPlan) -> _Forward:
        bucket = num_rows, length = graph_bucket(plan)
        kept = plan.kept
        assert kept is not None
        if not isinstance(kept[0], slice) or len(kept[1]) != num_rows * length:
            raise ValueError("in a graph every token is kept")
        forward = self._buckets.get(bucket)
        if forward is None:
            forward = self._buckets[bucket] = self._new_bucket(num_rows, length)
        assert forward.kept is not None and forward.paged is not None
        forward.kept[1].copy_(kept[1])
        self._plan_windows(
            forward.paged, plan.windows, not self._split_fits(num_rows, length)
        )
        return forward

    def _plan_full(self, lens: list[int]) -> None:
        shape = lens, lens
        if self._ragged.is_for(shape, []):
            return
        at = indptr(lens)
        if self.settings.full_backend == "cutlass":
            at = at.to(self._device)  # the others take lengths from the host
        self._ragged.plan(
            shape, [], at, at, **self._common(self.settings.is_deterministic)
        )

    def _plan_windows(
        self, paged: _Planned, rows: Sequence[Window], is_whole: bool = False
    ) -> None:
        """
        Args:
            is_whole: no row's keys are split among programs.
        """
        settings = self.settings
        shape = [row.num_tokens for row in rows], [row.canvas_len for row in rows]
        slots = slots_of(rows)
        if paged.is_for(shape, slots):
            return
        paged.plan(
            shape,
            slots,
            indptr(shape[0]),
            indptr(shape[1]),
            torch.cat(slots).to(torch.int32),
            torch.ones(len(rows), dtype=torch.int32),
            page_size=1,
            kv_data_type=settings.kv_dtype,
            **self._common(is_whole or settings.is_deterministic),
        )

    def _common(self, is_whole: bool) -> dict[str, Any]:
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

    def _new_paged(self, **buffers: torch.Tensor) -> _Planned:
        wrapper = self._paged_wrapper(
            self._workspace,
            "NHD",
            backend=self.settings.window_backend,
            use_cuda_graph=bool(buffers),
            **buffers,
        )
        return _Planned(wrapper, self._workspace.is_cuda)

    def _new_bucket(self, num_rows: int, length: int) -> _Forward:
        def zeros(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self._device)

        paged = self._new_paged(
            qo_indptr_buf=zeros(num_rows + 1),
            paged_kv_indptr_buf=zeros(num_rows + 1),
            paged_kv_indices_buf=zeros(num_rows * self.settings.max_canvas_len),
            paged_kv_last_page_len_buf=zeros(num_rows),
        )
        # A row that happens to be full reads its fresh keys and values in the pool.
        every = slice(None)
        slots = zeros(num_rows * length, torch.int64)
        return _Forward((), (every, slots), None, every, paged)

    def _split_fits(self, num_rows: int, length: int) -> bool:
        """Whether the workspace holds what a graph of split rows may need.

        For a graph FlashInfer reserves fp32 partial results of as many tiles as any
        lengths could need, and its plan fails where they do not fit. Batches as great
        as that fill the device without splitting.
        """
        settings = self.settings
        group = settings.num_heads // settings.num_kv_heads
        tiles = -(-num_rows * length * group // _TILE) + num_rows - 1
        if self._workspace.is_cuda:
            device = torch.cuda.get_device_properties(self._device)
            tiles = max(
                tiles, 2 * device.multi_processor_count // settings.num_kv_heads
            )
        partial = settings.num_heads * tiles * _TILE * (settings.head_dim + 1) * 4
        return partial <= self._workspace.numel()
