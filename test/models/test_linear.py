"""Products over padded rows: the same results, for few numbers of rows."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
from torch import nn
from torch.nn.functional import linear, silu

from sglang_dllm.models.linear import (
    PaddedLinear,
    gated_mlp,
    padded,
    padded_rows,
    padded_weights,
    use_padded_products,
)

HALVES = [torch.bfloat16, torch.float16]
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}


def layer_of(num_out: int, num_in: int, dtype: torch.dtype) -> ReplicatedLinear:
    layer = ReplicatedLinear(num_in, num_out, params_dtype=dtype)
    generator = torch.Generator().manual_seed(num_out)
    for parameter in (layer.weight, layer.bias):
        values = torch.randn(parameter.shape, generator=generator) / num_in**0.5
        parameter.data.copy_(values)
    return layer


def test_a_ragged_server_meets_few_numbers_of_rows() -> None:
    sizes = {padded_rows(n) for n in range(1, 4097)}
    assert len(sizes) < 100
    for n in range(1, 4097):
        assert n <= padded_rows(n) <= max(n + 15, n * 17 / 16)
    assert padded_rows(0) == 0 and padded_rows(padded_rows(777)) == padded_rows(777)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_rows", [0, 1, 16, 33])
def test_products_are_torchs(num_rows: int, dtype: torch.dtype) -> None:
    layer = layer_of(40, 24, dtype)
    x = torch.randn(num_rows, 48).to(dtype)[:, ::2]  # rows and columns lie apart
    wanted = linear(x, layer.weight, layer.bias)
    use_padded_products(nn.ModuleList([layer]))
    assert isinstance(layer.quant_method, PaddedLinear)
    torch.testing.assert_close(layer(x)[0], wanted, **TOLERANCE)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_rows", [0, 1, 33, 65])
def test_a_heads_products_are_torchs(num_rows: int, dtype: torch.dtype) -> None:
    """65 rows take the other order of factors."""
    torch.manual_seed(num_rows)
    layer = nn.Module()
    layer.weight = nn.Parameter((torch.randn(375, 24) / 5).to(dtype))
    layer.quant_method = UnquantizedEmbeddingMethod()
    use_padded_products(nn.ModuleList([layer]))
    x = torch.randn(num_rows, 24).to(dtype)
    found = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(found, linear(x, layer.weight), **TOLERANCE)
    assert should_apply_lm_head_quant_method(layer, layer.quant_method)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_rows", [0, 1, 33, 600])
def test_a_gated_mlp_is_torchs(num_rows: int, dtype: torch.dtype) -> None:
    """600 rows take the other order of factors."""
    torch.manual_seed(num_rows)
    gate_up = (torch.randn(96, 32) / 6).to(dtype)
    down = (torch.randn(32, 48) / 7).to(dtype)
    x = torch.randn(num_rows, 32).to(dtype)
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    found = gated_mlp(x, gate_up, down)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(silu(gate) * up, down), **TOLERANCE)


def test_what_is_loaded_later_counts() -> None:
    layer = layer_of(8, 8, torch.bfloat16)
    use_padded_products(nn.ModuleList([layer]))
    layer(torch.ones(1, 8).bfloat16())
    layer.weight_loader(layer.weight, 2 * torch.eye(8))
    layer.bias.data.zero_()
    found = layer(torch.arange(8.0).bfloat16()[None])[0]
    assert found.tolist() == [[2.0 * i for i in range(8)]]


def test_float32_stays_as_it_is() -> None:
    plain = layer_of(8, 8, torch.float32)
    before = plain.quant_method
    use_padded_products(nn.ModuleList([plain, nn.Linear(2, 2)]))
    assert plain.quant_method is before
    x = torch.ones(3, 8)
    assert padded(x) is x
    assert padded_weights(plain) is None
