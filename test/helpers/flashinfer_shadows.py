"""Stand-ins for FlashInfer's wrappers where there is no GPU.

They check every call against the documented contract and the real signatures, and
compute in plain torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from flashinfer import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)

from helpers.attention_batches import (
    WINDOWS,
    Batch,
    plan_of,
    pool_size,
    random_batch,
)
from sglang_dllm.attention.flashinfer import FlashInferCanvasAttention, Settings
from sglang_dllm.attention.sdpa import attend


class Shadow:
    """The part that both wrappers share.

    Attributes:
        plans: how often the wrapper was planned.
        calls: every ``run`` of a paged wrapper, ready to be called again.
    """

    real: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        said = inspect.signature(self.real.__init__).bind(self, *args, **kwargs)
        said.apply_defaults()
        workspace = said.arguments["float_workspace_buffer"]
        assert workspace.dtype == torch.uint8
        assert said.arguments["kv_layout"] == "NHD"
        self.is_graph = said.arguments["use_cuda_graph"]
        self.buffers = {k: v for k, v in said.arguments.items() if k.endswith("_buf")}
        self.backend = said.arguments["backend"]
        # Uninitialized memory, as the real one's.
        self._pin_memory_int_workspace_buffer = torch.full(
            (16,), 127, dtype=torch.uint8
        )
        self.plans = 0
        self.calls: list[Callable[[], torch.Tensor]] = []
        self.total: int | None = None

    def plan(self, *args: Any, **kwargs: Any) -> None:
        said = inspect.signature(self.real.plan).bind(self, *args, **kwargs)
        said.apply_defaults()
        self.said = said.arguments
        self.plans += 1
        for name in ("custom_mask", "packed_custom_mask", "logits_soft_cap"):
            assert self.said[name] is None
        assert not self.said["causal"]
        assert self.said["window_left"] == -1
        assert self.said["pos_encoding_mode"] == "NONE"
        assert self.said["num_qo_heads"] % self.said["num_kv_heads"] == 0
        self.q_len = self.check_indptr(self.said["qo_indptr"])

    def check_indptr(self, indptr: torch.Tensor) -> int:
        assert indptr.dtype == torch.int32
        assert indptr.device.type == "cpu", "reading it would wait for the device"
        assert indptr[0] == 0
        assert (indptr[1:] > indptr[:-1]).all()
        assert len(indptr) == len(self.said["qo_indptr"])
        return int(indptr[-1])

    def check_q(self, q: torch.Tensor, out: torch.Tensor) -> None:
        said = self.said
        assert q.shape == (self.q_len, said["num_qo_heads"], said["head_dim_qk"])
        assert q.dtype == said["q_data_type"]
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert q.is_contiguous()

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        qo: torch.Tensor,
        kv: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        for i in range(len(qo) - 1):
            own, keys = slice(qo[i], qo[i + 1]), slice(kv[i], kv[i + 1])
            result = attend(q[own].float(), k[keys].float(), v[keys].float(), 1, scale)
            out[own] = result.to(out.dtype)
        return out


class ShadowRagged(Shadow):
    real = BatchPrefillWithRaggedKVCacheWrapper

    def plan(self, *args: Any, **kwargs: Any) -> None:
        super().plan(*args, **kwargs)
        assert not self.is_graph
        assert self.said["kv_data_type"] in (None, self.said["q_data_type"])
        self.kv_len = self.check_indptr(self.said["kv_indptr"])

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = inspect.signature(self.real.run).bind(self, *args, **kwargs).arguments
        q, k, v = bound["q"], bound["k"], bound["v"]
        out = bound.get("out", torch.empty_like(q))
        self.check_q(q, out)
        said = self.said
        assert k.shape == v.shape
        assert k.shape == (self.kv_len, said["num_kv_heads"], said["head_dim_qk"])
        assert k.dtype == v.dtype == q.dtype
        assert k.stride(2) == v.stride(2) == 1
        indptrs = said["qo_indptr"], said["kv_indptr"]
        return self.attend(q, k, v, out, *indptrs, said["sm_scale"])


class ShadowPaged(Shadow):
    real = BatchPrefillWithPagedKVCacheWrapper

    def plan(self, *args: Any, **kwargs: Any) -> None:
        super().plan(*args, **kwargs)
        said = self.said
        num_windows = len(said["qo_indptr"]) - 1
        indices, last = said["paged_kv_indices"], said["paged_kv_last_page_len"]
        assert said["page_size"] == 1
        assert indices.dtype == last.dtype == torch.int32
        assert len(indices) == self.check_indptr(said["paged_kv_indptr"])
        assert last.tolist() == [1] * num_windows
        if not self.is_graph:
            self.buffers = {
                "qo_indptr_buf": said["qo_indptr"].clone(),
                "paged_kv_indptr_buf": said["paged_kv_indptr"].clone(),
                "paged_kv_indices_buf": indices.clone(),
            }
            return
        own = self.buffers
        assert all(
            own[name].dtype == torch.int32 for name in own if own[name] is not None
        )
        assert len(own["qo_indptr_buf"]) == num_windows + 1
        assert len(own["paged_kv_last_page_len_buf"]) == num_windows
        assert len(indices) <= len(own["paged_kv_indices_buf"])
        self.total = self.total or self.q_len
        assert self.q_len <= self.total
        own["qo_indptr_buf"].copy_(said["qo_indptr"])
        own["paged_kv_indptr_buf"].copy_(said["paged_kv_indptr"])
        own["paged_kv_indices_buf"][: len(indices)] = indices
        own["paged_kv_last_page_len_buf"].copy_(last)

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append(partial(self._run, *args, **kwargs))
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = inspect.signature(self.real.run).bind(self, *args, **kwargs).arguments
        q, (k_pool, v_pool) = bound["q"], bound["paged_kv_cache"]
        out = bound.get("out", torch.empty_like(q))
        self.check_q(q, out)
        said = self.said
        for pool in (k_pool, v_pool):
            assert pool.shape[1:] == (1, said["num_kv_heads"], said["head_dim_qk"])
            assert pool.dtype == said["kv_data_type"]
        qo, kv, slots = (
            self.buffers[name]
            for name in ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf")
        )
        at = slots[: kv[-1]].long()
        k, v = k_pool[at, 0], v_pool[at, 0]
        scale = said["sm_scale"] * (bound.get("k_scale") or 1.0)
        self.attend(q, k, v, out, qo, kv, scale)
        return out.mul_(bound.get("v_scale") or 1.0)


def attention_for(
    batch: Batch, shadows: bool = True, **settings: Any
) -> FlashInferCanvasAttention:
    given = {
        "num_heads": batch.q.shape[1],
        "num_kv_heads": batch.k.shape[1],
        "head_dim": batch.q.shape[2],
        "q_dtype": batch.q.dtype,
        "kv_dtype": batch.k_pool.dtype,
        "scale": batch.scale,
    }
    size = 2**20 if shadows else 2**27
    return FlashInferCanvasAttention(
        torch.empty(size, dtype=torch.uint8, device=batch.q.device),
        Settings(**{**given, **settings}),
        *((ShadowRagged, ShadowPaged) if shadows else ()),
    )


def half_batch(name: str, heads: tuple[int, int], **given: Any) -> Batch:
    windows = WINDOWS[name]
    given = {"dtype": torch.bfloat16, **given}
    return random_batch(plan_of(windows), pool_size(windows), heads, **given)
