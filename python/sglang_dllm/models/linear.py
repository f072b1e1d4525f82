"""Matrix products on a CPU: oneDNN's, over column-major weights.

They are as fast as oneDNN's packed weights, and a seventh faster than torch's default
product at a hundred tokens. Packed weights would be a second copy, which an update of
the weights would not reach.
"""

from __future__ import annotations

import os

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn

_KEPT_KERNELS = "16"
"""The number of kernels that oneDNN keeps, one for each batch size (its default: 1024).

Batches are ragged, so a server meets hundreds of sizes. Kept kernels lie between the
tensors of a step and fragment the heap, which then grows by hundreds of megabytes. A
new kernel takes some 30 us.
"""


class ColumnMajorLinear(UnquantizedLinearMethod):
    """``x W^T + b`` in float32 on a CPU. W ``(N, K)`` has the strides ``(1, N)``."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, layer.weight, bias, "none", [], ""
        )
        return product


def use_column_major(model: nn.Module) -> None:
    """Give a model's plain float32 layers on a CPU this layout and this product.

    Code that loads or reads the weights by index sees no difference.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if type(method) is not UnquantizedLinearMethod:
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            weight.data = weight.data.t().contiguous().t()
            layer.quant_method = ColumnMajorLinear()
            # oneDNN reads the variable at its first product.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_KERNELS)
