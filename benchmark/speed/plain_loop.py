"""The plain loop: transformers' modules, one request, one forward at a time.

It decodes by d3LLM's entropy rule, one block after the other (arXiv 2601.07568), which
is the server's ``EntropyThreshold``. It shares no code with the package.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmark.command import BenchmarkError

# The parts of a LLaDA block, and their names in a Llama layer.
_LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    **{f"{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_TOP = {
    "wte": "model.embed_tokens",
    "ln_f": "model.norm",
    "ff_out": "lm_head",
}
_LLADA_NAME = re.compile(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.weight")


@dataclass(frozen=True)
class PlainModel:
    """A full-attention model. Position i is read from logits row ``i - shift``."""

    module: torch.nn.Module
    shift: int
    mask_id: int
    eos_id: int

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``(L,)`` int64 to ``(L, V)`` float64. Row i predicts position i."""
        length = len(ids)
        # Transformers takes an additive mask as it is. Zeros let every position attend
        # to every position; without a mask the attention would be causal.
        everything = torch.zeros(1, 1, length, length)
        out = self.module(
            input_ids=ids[None], attention_mask=everything, use_cache=False
        )
        rows = (torch.arange(length) - self.shift).clamp(min=0)
        logits: torch.Tensor = out.logits[0][rows].double()
        return logits


def load(path: str) -> PlainModel:
    """A LLaDA or Dream checkpoint in float32.

    Raises:
        BenchmarkError: the architecture is another one.
    """
    config = json.loads((Path(path) / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors |= load_file(file)
    (architecture,) = config["architectures"]
    if architecture == "LLaDAModelLM":
        module = LlamaForCausalLM(_llama_config(config))
        tensors = {_llama_name(name): value for name, value in tensors.items()}
        shift = 0
    elif architecture == "DreamModel":
        module = Qwen2ForCausalLM(_qwen_config(config))
        shift = 1
    else:
        raise BenchmarkError(f"the plain loop has no {architecture}")
    module.eval().requires_grad_(False)
    module.load_state_dict({name: t.float() for name, t in tensors.items()})
    return PlainModel(module, shift, config["mask_token_id"], config["eos_token_id"])


def _llama_config(config: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config["embedding_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config["n_kv_heads"],
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def _qwen_config(config: dict[str, Any]) -> Qwen2Config:
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        "rms_norm_eps",
    )
    return Qwen2Config(
        **{name: config[name] for name in same},
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def _llama_name(name: str) -> str:
    match = _LLADA_NAME.fullmatch(name)
    if match is None:
        raise BenchmarkError(f"not a LLaDA tensor: {name}")
    layer, part = match.groups()
    if layer is None:
        return f"{_LLADA_TOP[part]}.weight"
    return f"model.layers.{layer}.{_LLADA_BLOCK[part]}.weight"


def decode(
    model: PlainModel,
    prompt: list[int],
    answer_len: int,
    threshold: float,
    block_size: int,
) -> tuple[list[int], int]:
    """The visible answer, before its first EOS, and the forwards it took.

    The loop ends when no mask stands before the first EOS, as the server does.

    Args:
        threshold: nats. A candidate with at most this entropy is accepted.
    """
    start = len(prompt)
    ids = torch.tensor([*prompt, *[model.mask_id] * answer_len])
    forwards = 0
    while True:
        answer = ids[start:].tolist()
        end = answer.index(model.eos_id) if model.eos_id in answer else answer_len
        if model.mask_id not in answer[:end]:
            return answer[:end], forwards
        first = answer.index(model.mask_id)
        block_end = min((first // block_size + 1) * block_size, answer_len)
        block = torch.arange(start + first, start + block_end)
        candidates = block[ids[block] == model.mask_id]
        logits = model.logits(ids)[candidates]
        forwards += 1
        p = logits.softmax(-1)
        entropy = -(p * (p + 1e-12).log()).sum(-1)
        # The rules of the two families differ only where an entropy is the threshold.
        accepted = entropy < threshold if model.shift else entropy <= threshold
        if not accepted.any():
            accepted[entropy.argmin()] = True
        logits[:, model.mask_id] = -torch.inf
        ids[candidates[accepted]] = logits.argmax(-1)[accepted]
