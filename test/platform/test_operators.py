"""Our forms of SGLang's layers in half precision: float32 inside, rounded once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding import base

from sglang_dllm.platform.operators import experts, register, rms_norm, rotate

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


def ulps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst difference in units of the last place of the found dtype."""
    size = exact.abs().clamp(min=1e-2) * torch.finfo(found.dtype).eps
    return float(((found.double() - exact).abs() / size).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_norm_is_sglangs(dtype: torch.dtype, with_residual: bool) -> None:
    torch.manual_seed(0)
    layer = RMSNorm(64, eps=1e-5, cast_x_before_out_mul=True).to(dtype)
    layer.weight.data.copy_(torch.rand(64) + 0.5)
    x = torch.randn(9, 64).to(dtype)
    residual = torch.randn(9, 64).to(dtype) if with_residual else None
    kept = x.clone(), None if residual is None else residual.clone()
    wanted = layer.forward_native(x, residual)
    found = rms_norm(layer, x, residual)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found, wanted, **close)
    assert torch.equal(x, kept[0])
    assert residual is None or torch.equal(residual, kept[1])


class Rotary:
    """The attributes of SGLang's layer, which needs a launched process to be built."""

    is_neox_style = True
    rotary_dim = head_size = 16

    def __init__(self) -> None:
        angles = torch.arange(512)[:, None] / 10000 ** (torch.arange(8) / 8)
        self.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_rotation_is_rounded_once(dtype: torch.dtype, fused: bool) -> None:
    """Angles in bfloat16 would be wrong by up to 8 units."""
    torch.manual_seed(1)
    layer = Rotary()
    both = torch.randn(7, 48).to(dtype)
    query, key = both.split((32, 16), dim=-1)
    if not fused:
        query, key = query.clone(), key.clone()
    positions = torch.tensor([0, 1, 5, 100, 300, 510, 511])
    angles = positions[:, None].double() / 10000 ** (torch.arange(8) / 8).double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    for x, found in zip(
        (query, key), rotate(layer, positions, query, key), strict=True
    ):
        first, second = x.double().unflatten(-1, (-1, 16)).chunk(2, dim=-1)
        parts = first * cos - second * sin, second * cos + first * sin
        exact = torch.cat(parts, dim=-1).flatten(-2)
        assert found.dtype == dtype and found.shape == x.shape
        if dtype in HALVES:
            assert ulps(found, exact) < 1
        else:
            torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_the_table_of_a_half_precision_model_is_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is longer than the model's context: SGLang adds positions at the launch."""
    monkeypatch.delenv("SGLANG_ROPE_CACHE_FP32", raising=False)
    register("a platform of this test")
    asked = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(base, "get_exec", lambda: asked)
    layer = base.RotaryEmbedding(16, 16, 512, 10000, True, torch.bfloat16)
    layer._ensure_cos_sin_cache_length(600)
    assert layer.cos_sin_cache.dtype == torch.float32 and len(layer.cos_sin_cache) > 600


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_tokens", [1, 21])
def test_experts_are_their_weighted_sum(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(2)
    settings = SimpleNamespace(
        activation="silu",
        gemm1_alpha=None,
        gemm1_clamp_limit=None,
        apply_router_weight_on_input=False,
    )
    layer = SimpleNamespace(
        num_experts=6,
        w13_weight=(torch.randn(6, 48, 32) / 6).to(dtype),
        w2_weight=(torch.randn(6, 32, 24) / 5).to(dtype),
    )
    x = torch.randn(num_tokens, 32).to(dtype)
    scores = torch.rand(num_tokens, 6)
    scores[:, 4] = 0  # an expert without tokens
    weights, ids = scores.topk(2)
    topk = (weights, ids.to(torch.int32), None)
    found = experts(
        SimpleNamespace(moe_runner_config=settings),
        layer,
        SimpleNamespace(hidden_states=x, topk_output=topk),
    ).hidden_states
    exact = torch.zeros(num_tokens, 32)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (layer.w13_weight[expert].float() @ x[token].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            exact[token] += weight * (layer.w2_weight[expert].float() @ inner)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=3e-2, atol=3e-2)
