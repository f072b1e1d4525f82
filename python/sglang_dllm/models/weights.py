"""From a checkpoint's tensors to SGLang's fused parameters.

SGLang keeps query, key and value in one parameter, gate and up in another, and all
experts of a layer in two. Checkpoints keep each in a tensor of its own. A missing or
unknown tensor is an error, since a model with a random parameter would still answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from sglang_dllm.models.file_pages import FilePages

ExpertPiece = tuple[str, str, int, str]
"""Our part, theirs, expert, shard: of ``FusedMoE.make_expert_params_mapping``."""

_FUSED: dict[str, dict[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
# Quantized layers always have these parameters, and a checkpoint may lack them: scales
# of the KV cache, and the order of an expert's inputs.
_OPTIONAL = re.compile(r".*\.attn\.[kv]_scale|.*\.experts\..*g_idx.*")


def rename_llama(name: str) -> str | None:
    """Our name of a tensor in the layout of Llama, Qwen2 and OLMoE."""
    if "rotary_emb.inv_freq" in name:
        return None
    return name.removeprefix("model.")


def load_tensors(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    rename: Callable[[str], str | None],
    experts: Sequence[ExpertPiece] = (),
) -> None:
    """Load a checkpoint's tensors under our names.

    Args:
        module: the model. Its parameters are written in place.
        weights: pairs of name and tensor in any order.
        rename: from a checkpoint's name to ours, where ``q_proj`` and the like are not
            fused. None for a tensor to ignore.
        experts: the names of a layer's experts in the checkpoint.

    Raises:
        ValueError: a parameter has no tensor, or a tensor has no parameter.
    """
    loaders = {
        name: loader
        for parameter_name, parameter in module.named_parameters()
        for name, loader in _pieces(parameter_name, parameter, experts)
    }
    needed = {name for name in loaders if not _OPTIONAL.fullmatch(name)}
    pages = FilePages()
    for their_name, tensor in weights:
        name = rename(their_name)
        if name is None:
            continue
        if name not in loaders:
            layer, _, leaf = name.rpartition(".")
            # GPTQ's tools write a zero bias for a layer that has none.
            if leaf == "bias" and f"{layer}.qweight" in loaders and not tensor.any():
                continue
            raise ValueError(f"unknown tensor {their_name!r} in the checkpoint")
        loaders[name](tensor)
        pages.release(tensor)
        needed.discard(name)
    if needed:
        raise ValueError(f"the checkpoint lacks {sorted(needed)[0]!r} and others")


def _pieces(
    name: str, parameter: nn.Parameter, experts: Sequence[ExpertPiece]
) -> Iterator[tuple[str, Callable[[torch.Tensor], object]]]:
    """The unfused names of a parameter, each with its loader."""
    load = partial(
        getattr(parameter, "weight_loader", default_weight_loader), parameter
    )
    for fused, shards in _FUSED.items():
        if f".{fused}." in name:
            for part, shard in shards.items():
                yield name.replace(fused, part), partial(_load_shard, load, shard)
            return
    whole = True
    for fused, part, expert, shard_id in experts:
        if f".{fused}" in name:
            whole = False
            yield (
                name.replace(fused, part),
                partial(_load_expert, load, name, shard_id, expert),
            )
    if whole:
        yield name, load


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
