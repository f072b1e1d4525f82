"""Loads quantized checkpoints through SGLang's loader, on a machine without kernels.

``python -m helpers.run_quantized JOB.pt OUT.pt``: JOB holds (checkpoint folder, launch
flags, batches) triples as for ``run_logits``. A checkpoint without batches is loaded
and not computed. For each, OUT gets the error, or the float32 logits, the class that
computes every layer, and where the checkpoint's tensors went.

SGLang's configs choose the methods, its methods make the parameters, its loader and
ours fill them. Plain torch replaces the products that only CUDA can do. It multiplies
with the dequantized weight: see ``install_shadows``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from helpers.other_process import leave
from helpers.run_logits import run_job

GROUP_SIZE = 128
Tensors = list[tuple[str, torch.Tensor]]


def fp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """weight: ``(K, N)`` float8; weight_scale: one number, or one for each column."""
    out = input @ (weight.float() * weight_scale.reshape(1, -1))
    return out if bias is None else out + bias


def fp8_block_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """weight: ``(N, K)`` float8; weight_scale: one number for each block."""
    for dim, size in enumerate(block_size):
        weight_scale = weight_scale.repeat_interleave(size, dim)
    n, k = weight.shape
    return nn.functional.linear(input, weight.float() * weight_scale[:n, :k], bias)


def quantize_rows(
    weight: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 of the same shape and ``(N, 1)`` scales, for --quantization fp8."""
    assert group_size == weight.shape[-1]
    scale = weight.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


def rows_of_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack GPTQ's ``(K / 8, N)`` int32 to ``(K, N)`` numbers of 0 to 15."""
    from sglang.srt.layers.quantization.utils import unpack_cols

    words, columns = packed.shape
    return unpack_cols(packed.t().contiguous(), 4, columns, words * 8).t()


def gptq_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    """order: ``(K,)`` rows of the weight sorted by group; empty if in order."""
    from sglang.srt.layers.quantization.utils import unpack_cols

    zeros = unpack_cols(qzeros, 4, *scales.shape) + 1  # stored less one
    q = rows_of_int4(qweight)
    group = torch.arange(len(q)) // GROUP_SIZE
    if len(order):
        group = torch.empty_like(group).index_put_((order.long(),), group)
    return x @ ((q - zeros[group]) * scales[group])


def install_shadows() -> None:
    """Replace kernels, and checks of the GPU, by plain torch."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from sglang.kernels.ops.quantization.awq_triton import awq_dequantize_decomposition
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS, fp8, marlin_utils
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.layers.quantization.compressed_tensors import schemes
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8 as w8a8,
    )
    from sglang.srt.layers.quantization.utils import convert_to_channelwise

    def awq_marlin(
        _: Any, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dense = awq_dequantize_decomposition(layer.qweight, layer.scales, layer.qzeros)
        return nn.functional.linear(x, dense.t(), bias)

    def gptq_marlin(
        kernel: Any, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        group = torch.arange(x.shape[-1]) // GROUP_SIZE
        if kernel.kernel_config.has_g_idx:
            group = layer.g_idx.long()
        dense = (rows_of_int4(layer.qweight) - 8) * layer.scales[group]
        return nn.functional.linear(x, dense.t(), bias)

    def packed_int4(
        _: Any, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        packed = layer.weight_packed
        shape = torch.Size([packed.shape[0], packed.shape[1] * 8])
        dense = unpack_from_int32(packed.data, 4, shape)
        scale = layer.weight_scale.repeat_interleave(GROUP_SIZE, 1)
        return nn.functional.linear(x, dense * scale, bias)

    # SGLang then takes the machine for a GPU that has FP8 and Marlin.
    awq._is_cuda = True
    marlin_utils.get_device_capability = lambda: (9, 0)
    fp8.cutlass_fp8_supported = lambda: True
    ct_config = QUANTIZATION_METHODS["compressed-tensors"]
    ct_config._check_scheme_supported = lambda *_, **__: True
    # The kernels compute in half precision, which would hide small differences.
    names = ("fp8", "compressed-tensors", "awq", "awq_marlin", "gptq", "gptq_marlin")
    for name in set(names) & set(QUANTIZATION_METHODS):
        config = QUANTIZATION_METHODS[name]
        config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])
    # FP8 replaces the products, and the quantization of an unquantized checkpoint.
    fp8.apply_fp8_linear = w8a8.apply_fp8_linear = fp8_linear
    fp8.dispatch_w8a8_block_fp8_linear = lambda **_: fp8_block_linear
    fp8.per_token_group_quant_fp8 = quantize_rows
    # SGLang requantizes a fused layer to its largest scale, which rounds once more.
    w8a8.requantize_with_max_scale = lambda weight, weight_scale, logical_widths: (
        convert_to_channelwise(weight_scale, logical_widths),
        weight,
    )
    # INT4 replaces the products, and keeps weights out of Marlin's own layout.
    awq_kernels.awq_dequantize = awq_dequantize_decomposition
    gptq_kernels.gptq_shuffle = lambda *_: None
    gptq_kernels.gptq_gemm = gptq_gemm
    for kernel, apply in {
        awq_kernels.AWQMarlinLinearKernel: awq_marlin,
        gptq_kernels.GPTQMarlinLinearKernel: gptq_marlin,
    }.items():
        kernel.process_weights_after_loading = lambda *_: None
        kernel.apply = apply
    schemes.CompressedTensorsWNA16.process_weights_after_loading = lambda *_: None
    schemes.CompressedTensorsWNA16.apply_weights = packed_int4


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as a vector; a copy if the tensor is not contiguous."""
    return tensor.data.reshape(-1).view(torch.uint8)


def loaded_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters but the scales of the KV cache, which have a default."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".attn.k_scale", ".attn.v_scale")):
            yield name, parameter


def load_over(model: nn.Module, tensors: Tensors, byte: int) -> dict[str, torch.Tensor]:
    """Fill all parameters with ``byte``, load, and return their bytes by name."""
    for _, parameter in loaded_parameters(model):
        filled = torch.empty(parameter.shape, dtype=parameter.dtype)
        as_bytes(filled).fill_(byte)
        parameter.data.copy_(filled)
    model.load_weights(iter(tensors))
    return {name: as_bytes(p).clone() for name, p in loaded_parameters(model)}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def audit(model: nn.Module, tensors: Tensors) -> dict[str, Any]:
    """Find the parameters that a load does not write, and those of each tensor.

    Returns:
        ``unwritten``: parameters of which a byte is not the checkpoint's;
        ``landed``: by the checkpoint's name, the parameters that change with a tensor,
        or the error where the changed one is refused.
    """
    loaded = load_over(model, tensors, 0x55)
    unwritten = differing(loaded, load_over(model, tensors, 0xAA))
    landed: dict[str, set[str] | str] = {}
    for index, (name, tensor) in enumerate(tensors):
        flipped = (~as_bytes(tensor)).view(tensor.dtype).reshape(tensor.shape)
        # The changed tensor comes last: shards of a fused layer overwrite the
        # description of their common input.
        others = tensors[:index] + tensors[index + 1 :]
        try:
            changed = load_over(model, [*others, (name, flipped)], 0x55)
        except ValueError as error:
            landed[name] = str(error)
        else:
            landed[name] = differing(loaded, changed)
    return {"unwritten": unwritten, "landed": landed}


def methods(model: nn.Module) -> dict[str, str]:
    """By layer: the class that computes it, SGLang's scheme or else its method."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod as Plain

    found = {}
    for name, module in model.named_modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            method = getattr(module, "scheme", None) or method
            # A subclass of the plain method, as ours for the CPU, counts as plain.
            kind = Plain if isinstance(method, Plain) else type(method)
            found[name] = kind.__name__
    return found


def audit_every_load() -> SimpleNamespace:
    """Make SGLang's loader audit each quantized checkpoint, and keep it in ``result``.

    With ``computes`` false a model is loaded only, and not made ready for kernels.
    """
    from sglang.srt.model_loader.loader import DefaultModelLoader

    latest = SimpleNamespace(result={}, computes=True)
    load_and_process = DefaultModelLoader.load_weights_and_postprocess

    def audited(model: nn.Module, weights: Iterator[Any], device: Any) -> None:
        tensors = list(weights)
        latest.result = {} if model.quant_config is None else audit(model, tensors)
        if latest.computes:
            load_and_process(model, tensors, device)

    DefaultModelLoader.load_weights_and_postprocess = staticmethod(audited)
    return latest


def main(job: str, out: str) -> None:
    install_shadows()
    latest = audit_every_load()

    def prepare(batches: list[Any]) -> None:
        latest.computes = bool(batches)

    def look(runner: Any) -> dict[str, Any]:
        return {"methods": methods(runner.model), **latest.result}

    run_job(job, out, look, prepare)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
