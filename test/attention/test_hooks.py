"""The hooks on SGLang's attention backends, and the writes to its KV pool.

FlashInfer's wrappers are shadowed, and Triton's kernel is plain torch.
"""

from __future__ import annotations

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
from sglang_dllm.attention.backends import BACKENDS, Backend, backend_of
from sglang_dllm.attention.base import CanvasAttention, UpstreamLayerPool
from sglang_dllm.attention.flashinfer import FlashInferCanvasAttention
from sglang_dllm.attention.sdpa import SDPACanvasAttention
from sglang_dllm.attention.triton import TritonCanvasAttention
from sglang_dllm.patches.attention_backends import HOOKS, attention_hooks


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


def attention_by(name: str, batch: Batch) -> CanvasAttention[Any]:
    if name == "triton":
        return TritonCanvasAttention("cpu")
    if name == "sdpa":
        return SDPACanvasAttention("cpu")
    return attention_for(batch)


@pytest.mark.parametrize("scales", [(None, None), (2.0, 0.5)], ids=["plain", "scaled"])
@pytest.mark.parametrize("windows", ["interleaved", "full, kept"])
@pytest.mark.parametrize("name", ["sdpa", "flashinfer", "triton"])
def test_keys_go_through_the_pool_and_come_back(
    name: str, windows: str, scales: tuple, plain_kernels: None
) -> None:
    """The pool divides its arguments in place. If all tokens are written, it gets
    views of the keys that full windows read afterwards."""
    batch = half_batch(windows, (4, 2))
    # Powers of two: the pool holds the oracle's numbers, divided.
    k_scale, v_scale = scales
    stored = replace(
        batch,
        k_pool=batch.k_pool / (k_scale or 1.0),
        v_pool=batch.v_pool / (v_scale or 1.0),
    )
    before = batch.k.clone()
    numbers = {"k_scale": k_scale, "v_scale": v_scale}
    floats = {"k_scale_float": k_scale, "v_scale_float": v_scale}
    attention = attention_by(name, batch)
    for pool in (
        UpstreamLayerPool.of(ScalingPool(stored), layer_of(batch, **numbers, **floats)),
        replace(stored.layer_pool, **numbers),
    ):
        attention.plan(batch.plan)
        is_close(attention.run(stored.q, stored.k, stored.v, pool, batch.scale), batch)
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


EACH = pytest.mark.parametrize("backend", BACKENDS, ids=[b.name for b in BACKENDS])


@EACH
@pytest.mark.parametrize("name", ["full", "windows", "interleaved"])
def test_the_hooks_serve_a_planned_forward(
    name: str, backend: Backend, plain_kernels: None
) -> None:
    batch = half_batch(name, (4, 2))
    batch = replace(batch, scale=batch.q.shape[2] ** -0.5)
    before = batch.copy()
    upstream = upstream_backend(batch)
    forward_batch = SimpleNamespace(plan=batch.plan)
    plan, extend = (hook.fn for hook in attention_hooks(backend))
    q, k, v = (x.flatten(1) for x in (batch.q, batch.k, batch.v))
    assert plan(upstream_must_not_run, upstream, forward_batch) is None
    attention = upstream.canvas_attention
    for _ in range(2):  # layers
        out = extend(
            *(upstream_must_not_run, upstream, q, k, v, layer_of(batch)),
            forward_batch,
            save_kv_cache=True,
        )
    assert type(attention) is backend.attention_class
    assert attention is upstream.canvas_attention is backend.attention_of(upstream)
    assert out.shape == q.shape
    is_close(out, before)
    for pool, wanted in zip(batch.pools, expected(before)[1:], strict=True):
        assert torch.equal(pool, wanted)


@pytest.mark.parametrize("forward_batch", [object(), SimpleNamespace(plan=None)])
def test_without_a_plan_the_hooks_are_upstream(forward_batch: Any) -> None:
    calls = []

    def upstream(*args: Any, **named: Any) -> str:
        calls.append((args, named))
        return "upstream's"

    for hook in HOOKS:
        # All that the contract names, by position and, with a default, by keyword.
        args = {name: object() for name in hook.contract}
        args["forward_batch"] = forward_batch
        assert hook.fn(upstream, *args.values()) == "upstream's"
        assert calls.pop() == (tuple(args.values()), {})
        first = hook.contract.index("forward_batch") + 1
        by_position = [args[name] for name in hook.contract[:first]]
        named = {name: args[name] for name in hook.contract[first:]}
        assert hook.fn(upstream, *by_position, **named) == "upstream's"
        assert calls.pop() == (tuple(by_position), named)


def test_a_backend_is_found_by_the_class_of_sglangs() -> None:
    for backend in BACKENDS:
        assert backend_of(type(backend.name, (), {})()) is backend
    assert backend_of(object()) is None


def test_layers_of_another_scale_are_noticed(plain_kernels: None) -> None:
    batch = half_batch("full", (4, 2))
    attention = FlashInferCanvasAttention.from_upstream(upstream_backend(batch))
    attention.plan(batch.plan)
    with pytest.raises(AssertionError, match="scales"):
        attention.run(batch.q, batch.k, batch.v, batch.layer_pool, 1.0)


def test_flashinfer_is_told_upstreams_choices(plain_kernels: None) -> None:
    attention = FlashInferCanvasAttention.from_upstream(
        upstream_backend(half_batch("windows", (4, 2)))
    )
    assert attention._ragged.wrapper.backend == "fa3"
    assert attention._paged.wrapper.backend == "fa2"


def test_an_fp4_pool_is_refused(plain_kernels: None) -> None:
    backend = upstream_backend(half_batch("windows", (4, 2)))
    backend.prefill_uses_dequant_workspace = True
    with pytest.raises(ValueError, match="fp4"):
        FlashInferCanvasAttention.from_upstream(backend)
