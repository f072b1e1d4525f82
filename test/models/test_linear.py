"""Column-major weights: the same products and the same loading as with rows."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from torch import nn

from sglang_dllm.models.linear import ColumnMajorLinear, use_column_major


def layer_of(num_out: int, num_in: int, dtype: torch.dtype) -> ReplicatedLinear:
    layer = ReplicatedLinear(num_in, num_out, params_dtype=dtype)
    generator = torch.Generator().manual_seed(num_out)
    for parameter in (layer.weight, layer.bias):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("num_rows", [0, 1, 33])
def test_products_are_torchs(num_rows: int) -> None:
    layer = layer_of(40, 24, torch.float32)
    x = torch.randn(num_rows, 48)[:, ::2]  # rows and columns lie apart
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    use_column_major(nn.ModuleList([layer]))
    assert isinstance(layer.quant_method, ColumnMajorLinear)
    assert layer.weight.stride() == (1, 40)
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_what_is_loaded_later_counts() -> None:
    layer = layer_of(8, 8, torch.float32)
    use_column_major(nn.ModuleList([layer]))
    layer(torch.ones(1, 8))
    layer.weight_loader(layer.weight, 2 * torch.eye(8))
    layer.bias.data.zero_()
    assert layer(torch.arange(8.0)[None])[0].tolist() == [[2.0 * i for i in range(8)]]


def test_other_layers_stay_as_they_are() -> None:
    half = layer_of(8, 8, torch.bfloat16)
    before = half.quant_method
    use_column_major(nn.ModuleList([half, nn.Linear(2, 2)]))
    assert half.quant_method is before
