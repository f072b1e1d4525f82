"""Oracle models: LLaDA and Dream built from transformers' own Llama and Qwen2.

LLaDA is a Llama with other tensor names and no causal mask; Dream is a Qwen2 with no
causal mask whose logits are read one position late. This module owns those facts and
knows nothing of decoding. `KeyValueMemory` is the `reference.memory` of all of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from reference.memory import check_window, shift_right, usable_rows

# LLaDA block submodule -> Llama layer submodule. Inside a block `ff_out` is the down
# projection; the tensor `model.transformer.ff_out` is the LM head.
_LLADA_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_TOP_NAMES = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_LLADA_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)")

# Values the mapping onto Llama relies on; any other value is another model.
_LLADA_REQUIRED = {
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "block_type": "llama",
    "rope": True,
    "include_bias": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "alibi": False,
}


@dataclass(frozen=True)
class ReferenceModel:
    """One full-attention model, batch 1, with the token facts decoding needs.

    Calling it gives the *usable* logits: row i predicts position i, in both families.
    """

    module: torch.nn.Module
    family: str  # "llada" | "dream"
    mask_id: int
    eos_id: int

    @torch.no_grad()
    def raw_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, V) float, row i computed from hidden state i.

        V counts all rows of the LM head (`embedding_size`), padded ones included.
        """
        num_tokens = ids.shape[0]
        device = self.module.device
        # A ready 4-D additive mask is used as it is by transformers: all zeros means
        # every position attends to every position. Passing None would mean causal.
        full = torch.zeros(
            1, 1, num_tokens, num_tokens, dtype=self.module.dtype, device=device
        )
        output = self.module(
            input_ids=ids.to(device)[None], attention_mask=full, use_cache=False
        )
        return output.logits[0]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, V) float, row i predicts the token at position i."""
        raw = self.raw_logits(ids)
        return shift_right(raw) if self.family == "dream" else raw

    __call__ = logits

    def new_memory(self) -> KeyValueMemory:
        return KeyValueMemory(self.module, shift=self.family == "dream")


class KeyValueMemory:
    """The keys and values of one canvas, batch 1: a `reference.memory.Memory`."""

    def __init__(self, module: torch.nn.Module, *, shift: bool) -> None:
        self.module, self.shift = module, shift
        self.canvas: _CanvasCache | None = None

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, V) float, row i predicts position i."""
        self.canvas = _CanvasCache(len(ids))
        return self.window(ids, 0, len(ids))

    @torch.no_grad()
    def window(self, ids: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """ids: (L,) int64 -> (L, V) float, NaN where rows lo to hi - 1 say nothing."""
        known_len = None if self.canvas is None else self.canvas.canvas_len
        check_window(known_len, ids, lo, hi)
        assert self.canvas is not None
        self.canvas.lo = lo
        canvas_len, device = len(ids), self.module.device
        # All zeros: no causal mask, as in `raw_logits`.
        everything = torch.zeros(
            1, 1, hi - lo, canvas_len, dtype=self.module.dtype, device=device
        )
        output = self.module(
            input_ids=ids[None, lo:hi].to(device),
            attention_mask=everything,
            position_ids=torch.arange(lo, hi, device=device)[None],
            past_key_values=self.canvas,
            use_cache=True,
        )
        return usable_rows(output.logits[0], lo, canvas_len, self.shift)


class _CanvasCache(Cache):
    """Keys and values of the whole canvas, written at any place, not only appended.

    Transformers' attention asks `update` for what to attend to, with rotary positions
    already in the keys, and needs nothing else of a cache here: mask and positions of
    the rows are given.
    """

    def __init__(self, canvas_len: int) -> None:
        super().__init__(layers=[])
        self.canvas_len = canvas_len
        self.lo = 0  # position of the first row of the forward that runs
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, heads, rows, head size) each -> the same of all positions."""
        num_rows = key_states.shape[2]
        if num_rows == self.canvas_len:
            self.stored[layer_idx] = key_states.clone(), value_states.clone()
        keys, values = self.stored[layer_idx]
        keys[:, :, self.lo : self.lo + num_rows] = key_states
        values[:, :, self.lo : self.lo + num_rows] = value_states
        return keys, values


def load(path: str | Path, **options: Any) -> ReferenceModel:
    """Load any family, told apart by `architectures` as the real configs do."""
    from reference import a2d_models
    from reference.llama_models import load_diffullama, load_llada_moe

    architecture = architecture_of(read_config(path))
    if architecture == "LLaDAModelLM":
        return load_llada(path, **options)
    if architecture == "DreamModel":
        return load_dream(path, **options)
    if architecture in ("LLaDAMoEModelLM", "LLaDAMoEModel"):
        return load_llada_moe(path, **options)
    if architecture == "LlamaForCausalLM":
        return load_diffullama(path, **options)
    if architecture in a2d_models.CLASSES:
        return a2d_models.load_a2d(path, **options)
    raise ValueError(f"not the architecture of a family: {architecture}")


def architecture_of(config: dict[str, Any]) -> str:
    """The name in the file; a file without one has that of its model_type."""
    unnamed = {"a2d-qwen3": "A2DQwen3LMHeadModel"}
    default = unnamed.get(config["model_type"], "LLaDAModelLM")
    return (config.get("architectures") or [default])[0]


def load_llada(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    """Load a LLaDA folder (Hugging Face layout) as a bidirectional Llama."""
    config = read_config(path)
    for key, wanted in _LLADA_REQUIRED.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"LLaDA {key}: expected {wanted!r}, found {config[key]!r}")
    llama_config = LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=rope_parameters(config),
        attention_bias=config["include_qkv_bias"],
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    tensors = {_llama_name(k): v for k, v in read_tensors(path).items()}
    if config["include_qkv_bias"]:
        # Llama's one switch also gives o_proj a bias; LLaDA has none there.
        for layer in range(config["n_layers"]):
            name = f"model.layers.{layer}.self_attn.o_proj.bias"
            tensors[name] = torch.zeros(config["d_model"])
    module = build(LlamaForCausalLM, llama_config, tensors, dtype, device)
    return ReferenceModel(
        module, "llada", config["mask_token_id"], config["eos_token_id"]
    )


def load_dream(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    """Load a Dream folder (Hugging Face layout) as a bidirectional Qwen2."""
    config = read_config(path)
    if config["use_sliding_window"]:
        raise ValueError("Dream: expected no sliding window")
    qwen_config = Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads")
        or config["num_attention_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        hidden_act=config["hidden_act"],
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    tensors = read_tensors(path)
    if not config.get("attention_bias", True):
        # Qwen2 has no such switch; zeros compute the same.
        kv_rows = tensors["model.layers.0.self_attn.k_proj.weight"].shape[0]
        for layer in range(config["num_hidden_layers"]):
            for x in "qkv":
                rows = config["hidden_size"] if x == "q" else kv_rows
                name = f"model.layers.{layer}.self_attn.{x}_proj.bias"
                tensors[name] = torch.zeros(rows)
    module = build(Qwen2ForCausalLM, qwen_config, tensors, dtype, device)
    return ReferenceModel(
        module, "dream", config["mask_token_id"], config["eos_token_id"]
    )


def build(
    cls: type[Any],
    config: Any,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: str,
) -> torch.nn.Module:
    # Rotary frequencies stay float32 as in both published models, so only weights are
    # cast: build first, then load tensors already in the wanted dtype.
    module = cls(config).eval().requires_grad_(False)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.load_state_dict(tensors, strict=True)
    return module.to(device)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 has them, from the fields of either transformers."""
    given = {
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    given.setdefault("rope_type", given.pop("type", "default"))
    given.setdefault("rope_theta", config.get("rope_theta"))
    return given


def _llama_name(name: str) -> str:
    if name in _LLADA_TOP_NAMES:
        return _LLADA_TOP_NAMES[name]
    match = _LLADA_BLOCK.fullmatch(name)
    if match is None or match[2] not in _LLADA_BLOCK_NAMES:
        raise ValueError(f"not a LLaDA tensor name: {name}")
    return f"model.layers.{match[1]}.{_LLADA_BLOCK_NAMES[match[2]]}.{match[3]}"


def read_config(path: str | Path) -> dict[str, Any]:
    return json.loads((Path(path) / "config.json").read_text())


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(Path(path).glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors
