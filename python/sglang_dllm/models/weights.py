"""From a checkpoint's tensors to SGLang's fused parameters, with nothing left over.

SGLang keeps query, key and value in one parameter, gate and up in another, and all
experts of a layer in two; checkpoints keep each by itself. A parameter is complete only
when all of its pieces have come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

ExpertPiece = tuple[str, str, int, str]
"""``FusedMoE.make_expert_params_mapping``'s: our part, theirs, expert, shard."""

_FUSED: dict[str, dict[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
# Quantized layers have these whether or not a checkpoint does: scales of the KV cache,
# and the order of an expert's inputs.
_OPTIONAL = re.compile(r".*\.attn\.[kv]_scale|.*\.experts\..*g_idx.*")


def rename_llama(name: str) -> str | None:
    """Our name of a tensor in Llama's layout; Qwen2's and OLMoE's are the same."""
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
        module: the model, its parameters written in place.
        weights: name and tensor pairs of the checkpoint, in any order.
        rename: from a checkpoint's name to ours, with ``q_proj`` and the like
            unfused; None for a tensor to ignore.
        experts: how a layer's fused experts are named in the checkpoint.

    Raises:
        ValueError: a tensor of ours is missing, or one of theirs unknown.
    """
    loaders = {
        name: loader
        for parameter_name, parameter in module.named_parameters()
        for name, loader in _pieces(parameter_name, parameter, experts)
    }
    needed = {name for name in loaders if not _OPTIONAL.fullmatch(name)}
    for their_name, tensor in weights:
        name = rename(their_name)
        if name is None:
            continue
        if name not in loaders:
            layer, _, leaf = name.rpartition(".")
            # GPTQ's tools write a bias for every layer, zero where there is none.
            if leaf == "bias" and f"{layer}.qweight" in loaders and not tensor.any():
                continue
            raise ValueError(f"unknown tensor {their_name!r} in the checkpoint")
        loaders[name](tensor)
        needed.discard(name)
    if needed:
        raise ValueError(f"the checkpoint lacks {sorted(needed)[0]!r} and others")


def _pieces(
    name: str, parameter: nn.Parameter, experts: Sequence[ExpertPiece]
) -> Iterator[tuple[str, Callable[[torch.Tensor], object]]]:
    """Unfused names of a parameter, each with what loads it."""
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
