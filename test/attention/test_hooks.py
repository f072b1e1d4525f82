"""The hooks on SGLang's attention backends, and what passes through its KV pool.

FlashInfer's wrappers are shadowed; Triton's kernel is the oracle's torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.attention_batches import Batch, expected, plain_canvas_attention
from helpers.flashinfer_shadows import (
    ShadowPaged,
    ShadowRagged,
    attention_for,
    half_batch,
)
from sglang_dllm.attention import triton as triton_module
from sglang_dllm.attention.base import into_pool
from sglang_dllm.attention.flashinfer import FlashInferCanvasAttention
from sglang_dllm.attention.plan import forward_plan
from sglang_dllm.attention.triton import TritonCanvasAttention
from sglang_dllm.patches import flashinfer_backend, triton_backend


class ScalingPool:
    """SGLang's pool with scales: it divides what it is handed in place."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer_id == 5
        return self.batch.pools

    def set_kv_buffer(
        self, layer: Any, loc: Any, k: Any, v: Any, k_scale: Any, v_scale: Any
    ) -> None:
        assert loc.dtype == torch.int64
        for pool, x, scale in (
            (self.batch.k_pool, k, k_scale),
            (self.batch.v_pool, v, v_scale),
        ):
            if scale is not None:
                x.div_(scale)
            pool[loc] = x.to(pool.dtype)


def layer_of(batch: Batch, **others: Any) -> SimpleNamespace:
    num_kv_heads, head_dim = batch.k.shape[1:]
    given = {
        "layer_id": 5,
        "scaling": batch.scale,
        "tp_q_head_num": batch.q.shape[1],
        "tp_k_head_num": num_kv_heads,
        "tp_v_head_num": num_kv_heads,
        "qk_head_dim": head_dim,
        "v_head_dim": head_dim,
        "k_scale": None,
        "v_scale": None,
        "k_scale_float": None,
        "v_scale_float": None,
    }
    return SimpleNamespace(**{**given, **others})


def is_close(out: torch.Tensor, batch: Batch) -> None:
    torch.testing.assert_close(
        out.view(batch.q.shape).float(), expected(batch)[0], atol=1e-2, rtol=1e-2
    )


def flashinfer_run(batch: Batch, stored: Batch, **scales: Any) -> torch.Tensor:
    attention = attention_for(batch)
    attention.plan(batch.plan)
    return attention.run(stored.q, stored.k, stored.v, *stored.pools, **scales)


def triton_run(batch: Batch, stored: Batch, **scales: Any) -> torch.Tensor:
    attention = TritonCanvasAttention("cpu", 160)
    attention.plan(batch.plan)
    return attention.run(
        *(stored.q, stored.k, stored.v, *stored.pools, batch.scale), **scales
    )


@pytest.mark.parametrize("scales", [(None, None), (2.0, 0.5)], ids=["plain", "scaled"])
@pytest.mark.parametrize("run", [flashinfer_run, triton_run])
def test_keys_go_through_the_pool_and_come_back(
    run: Callable[..., torch.Tensor], scales: tuple, plain_kernels: None
) -> None:
    batch = half_batch("interleaved", (4, 2))
    # Powers of two: the pool holds the oracle's numbers, divided.
    k_scale, v_scale = scales
    stored = replace(
        batch,
        k_pool=batch.k_pool / (k_scale or 1.0),
        v_pool=batch.v_pool / (v_scale or 1.0),
    )
    before = batch.k.clone()
    layer = layer_of(batch, k_scale=k_scale, v_scale=v_scale)
    write = into_pool(ScalingPool(stored), layer)
    is_close(run(batch, stored, write=write, k_scale=k_scale, v_scale=v_scale), batch)
    _, k_pool, v_pool = expected(batch)
    assert torch.equal(stored.k_pool * (k_scale or 1.0), k_pool)
    assert torch.equal(stored.v_pool * (v_scale or 1.0), v_pool)
    assert torch.equal(stored.k, before)


def upstream_backend(batch: Batch) -> SimpleNamespace:
    """The attributes of SGLang's backends that we read."""
    updater = SimpleNamespace(
        num_qo_heads=batch.q.shape[1],
        num_kv_heads=batch.k.shape[1],
        head_dim=batch.q.shape[2],
        q_data_type=batch.q.dtype,
        data_type=batch.k_pool.dtype,
    )
    return SimpleNamespace(
        device="cpu",
        indices_updater_prefill=updater,
        prefill_uses_dequant_workspace=False,
        max_context_len=160,
        enable_deterministic=False,
        prefill_wrapper_ragged=SimpleNamespace(_backend="fa3"),
        prefill_backend="fa2",
        workspace_buffer=torch.empty(2**20, dtype=torch.uint8),
        token_to_kv_pool=ScalingPool(batch),
    )


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashinfer.BatchPrefillWithRaggedKVCacheWrapper", ShadowRagged)
    monkeypatch.setattr("flashinfer.BatchPrefillWithPagedKVCacheWrapper", ShadowPaged)
    monkeypatch.setattr(
        triton_module, "triton_canvas_attention", plain_canvas_attention
    )


def upstream_must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("upstream was called")


PATCHES = pytest.mark.parametrize(
    "patch", [flashinfer_backend, triton_backend], ids=["flashinfer", "triton"]
)


@PATCHES
@pytest.mark.parametrize("name", ["full", "windows", "interleaved"])
def test_the_hooks_serve_a_planned_forward(
    name: str, patch: Any, plain_kernels: None
) -> None:
    batch = half_batch(name, (4, 2))
    batch = replace(batch, scale=batch.q.shape[2] ** -0.5)
    before = batch.copy()
    backend, nothing = upstream_backend(batch), SimpleNamespace()
    q, k, v = (x.flatten(1) for x in (batch.q, batch.k, batch.v))
    with forward_plan(batch.plan):
        patch._init_forward_metadata(upstream_must_not_run, backend, nothing)
        attention = backend.canvas_attention
        for _ in range(2):  # layers
            out = patch._forward_extend(
                *(upstream_must_not_run, backend, q, k, v, layer_of(batch), nothing)
            )
    assert attention is backend.canvas_attention is type(attention).of(backend)
    assert out.shape == q.shape
    is_close(out, before)
    for pool, wanted in zip(batch.pools, expected(before)[1:], strict=True):
        assert torch.equal(pool, wanted)


@PATCHES
def test_without_a_plan_the_hooks_are_upstream(patch: Any) -> None:
    calls = []

    def upstream(*args: Any) -> str:
        calls.append(args)
        return "upstream's"

    # All that the contract names; its defaults are upstream's.
    for hook in patch.HOOKS:
        args = tuple(object() for _ in hook.contract)
        assert hook.fn(upstream, *args) == "upstream's"
        assert calls.pop() == args


def test_layers_of_another_scale_are_noticed(plain_kernels: None) -> None:
    batch = half_batch("full", (4, 2))
    backend = upstream_backend(batch)
    with forward_plan(batch.plan), pytest.raises(AssertionError, match="scales"):
        flashinfer_backend._forward_extend(
            *(upstream_must_not_run, backend, batch.q, batch.k, batch.v),
            *(layer_of(batch, scaling=1.0), SimpleNamespace()),
        )


def test_flashinfer_is_told_upstreams_choices(plain_kernels: None) -> None:
    attention = FlashInferCanvasAttention.of(
        upstream_backend(half_batch("windows", (4, 2)))
    )
    assert attention._ragged.wrapper.backend == "fa3"
    assert attention._paged.wrapper.backend == "fa2"


def test_an_fp4_pool_is_refused(plain_kernels: None) -> None:
    backend = upstream_backend(half_batch("windows", (4, 2)))
    backend.prefill_uses_dequant_workspace = True
    with pytest.raises(ValueError, match="fp4"):
        FlashInferCanvasAttention.of(backend)
