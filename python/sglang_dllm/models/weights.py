"""From a checkpoint's tensors to SGLang's fused parameters.

SGLang keeps query, key and value in one parameter, gate and up in another, and all
experts of a layer in two. Checkpoints keep each in a tensor of its own. A missing or
unknown tensor is an error, since a model with a random parameter would still answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from sglang.srt.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.file_pages import FilePages
from sglang_dllm.models.tied_head import EMBEDDING, HEAD, TiedHead

ExpertPiece = tuple[str, str, int, str]
"""Our part, theirs, expert, shard: of ``FusedMoE.make_expert_params_mapping``."""

_FUSED: dict[str, dict[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
# Quantized layers always have these parameters, and a checkpoint may lack them: scales
# of the KV cache, and the order of an expert's inputs.
_OPTIONAL = re.compile(r".*\.attn\.[kv]_scale|.*\.experts\..*g_idx.*")


def is_buffer(name: str) -> bool:
    """True for a tensor that is computed from the config: older tools save it."""
    return name.endswith("rotary_emb.inv_freq")


def rename_llama(name: str) -> str | None:
    """Our name of a tensor in the layout of Llama, Qwen2 and OLMoE."""
    if is_buffer(name):
        return None
    return name.removeprefix("model.")


def load_tensors(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    rename: Callable[[str], str | None],
    experts: Sequence[ExpertPiece] = (),
    tied: TiedHead | None = None,
    may_lack: str = "",
) -> set[str]:
    """Load a checkpoint's tensors under our names.

    Args:
        module: the model. Its parameters are written in place.
        weights: pairs of name and tensor in any order.
        rename: from a checkpoint's name to ours, where ``q_proj`` and the like are not
            fused. None for a tensor to ignore.
        experts: the names of a layer's experts in the checkpoint.
        tied: compares a head in the checkpoint with the embedding, where the model has
            no head of its own.
        may_lack: the name of a submodule that may have no tensors.

    Returns:
        The names that the checkpoint lacks, all below ``may_lack``.

    Raises:
        ConfigError: a parameter has no tensor, a tensor has no parameter or another
            shape, a surplus head differs from the embedding, or a file is broken.
    """
    loaders = {
        name: piece
        for parameter_name, parameter in module.named_parameters()
        for name, piece in _pieces(module, parameter_name, parameter, experts)
    }
    needed = {name for name in loaders if not _OPTIONAL.fullmatch(name)}
    pages = FilePages()
    for their_name, tensor in _readable(weights):
        name = rename(their_name)
        if name is None:
            continue
        if tied is not None and name == HEAD:
            tied.compare(their_name, tensor, EMBEDDING not in needed)
            continue
        if name not in loaders:
            layer, _, leaf = name.rpartition(".")
            # GPTQ's tools write a zero bias for a layer that has none.
            if leaf == "bias" and f"{layer}.qweight" in loaders and not tensor.any():
                continue
            raise ConfigError(f"unknown tensor {their_name!r} in the checkpoint")
        loaders[name].load(their_name, tensor)
        pages.release(tensor)
        needed.discard(name)
        if tied is not None and name == EMBEDDING:
            tied.embedding_is_loaded()
    optional = {name for name in needed if name.split(".")[0] == may_lack}
    if needed - optional or (optional and len(optional) < _count(loaders, may_lack)):
        first, *others = sorted(needed)
        more = f" and {len(others)} others" if others else ""
        raise ConfigError(f"the checkpoint lacks {first!r}{more}")
    return optional


def _count(loaders: Iterable[str], part: str) -> int:
    return sum(name.split(".")[0] == part for name in loaders)


def _readable(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors. An error of the reader names no reason that a user knows."""
    # A pickle may run code. SGLang 0.5.17 reads one in a tar file without a bound.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    tensors = iter(weights)
    while True:
        try:
            found = next(tensors, None)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(f"the weights cannot be read: {error}") from error
        if found is None:
            return
        yield found


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that one tensor of a checkpoint fills.

    Attributes:
        fill: SGLang's loader. It takes a part of a tensor that is too large without a
            word.
        shape: of the tensor; None where the format of a quantization decides.
    """

    fill: Callable[[torch.Tensor], object]
    shape: tuple[int, ...] | None

    def load(self, their_name: str, tensor: torch.Tensor) -> None:
        """Fill the part.

        Raises:
            ConfigError: the tensor does not fit.
        """
        found = tuple(tensor.shape)
        is_plain = self.shape is not None and tensor.is_floating_point()
        if is_plain and found != self.shape:
            raise ConfigError(
                f"tensor {their_name!r} has the shape {list(found)}; config.json "
                f"expects {list(self.shape or ())}"
            )
        try:
            self.fill(tensor)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            reason = f": {error}" if str(error) else ""
            raise ConfigError(
                f"tensor {their_name!r} of shape {list(found)} does not fit the "
                f"model{reason}"
            ) from error


def _pieces(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    experts: Sequence[ExpertPiece],
) -> Iterator[tuple[str, Piece]]:
    """The unfused names of a parameter, each with its part of it."""
    path, _, leaf = name.rpartition(".")
    layer = module.get_submodule(path)
    load = partial(
        getattr(parameter, "weight_loader", default_weight_loader), parameter
    )
    for fused, shards in _FUSED.items():
        if f".{fused}." in name:
            for part, shard in shards.items():
                shape = _shape(layer, leaf, parameter, shard)
                fill = partial(_load_shard, load, shard)
                yield name.replace(fused, part), Piece(fill, shape)
            return
    whole = True
    for fused, part, expert, shard_id in experts:
        if f".{fused}" in name:
            whole = False
            fill = partial(_load_expert, load, name, shard_id, expert)
            shape = _shape(layer, leaf, parameter, shard_id)
            yield name.replace(fused, part), Piece(fill, shape)
    if whole:
        yield name, Piece(load, _shape(layer, leaf, parameter, 0))


def _shape(
    layer: nn.Module, leaf: str, parameter: nn.Parameter, shard: str | int
) -> tuple[int, ...] | None:
    """The shape of a plain tensor of a layer, before ranks take their parts."""
    if isinstance(layer, FusedMoE):
        width = layer.intermediate_size_per_partition * layer.moe_tp_size
        shape = (
            (layer.hidden_size, width) if shard == "w2" else (width, layer.hidden_size)
        )
        return shape if leaf in ("w13_weight", "w2_weight") else None
    if leaf not in ("weight", "bias"):
        return None
    if isinstance(layer, QKVParallelLinear):
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        rows, columns = heads * layer.head_size, layer.input_size
    elif isinstance(layer, MergedColumnParallelLinear):
        rows, columns = layer.output_sizes[int(shard)], layer.input_size
    elif isinstance(layer, LinearBase):
        rows, columns = layer.output_size, layer.input_size
    elif isinstance(layer, VocabParallelEmbedding):
        rows, columns = layer.org_vocab_size, layer.embedding_dim
    else:
        return tuple(parameter.shape)
    return (rows, columns) if leaf == "weight" else (rows,)


def _load_shard(
    load: Callable[..., object], shard: str | int, tensor: torch.Tensor
) -> None:
    load(tensor, shard)


def _load_expert(
    load: Callable[..., object],
    name: str,
    shard_id: str,
    expert: int,
    tensor: torch.Tensor,
) -> None:
    load(tensor, name, shard_id=shard_id, expert_id=expert)
