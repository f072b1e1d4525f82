"""The fields of a checkpoint's config.json: read, refused or ignored, and why.

One table for each family; docs/checkpoints.md shows them. A field that changes the
forward is read, or refused unless it has a value that our module computes. A field that
no table knows passes, since no code of the family reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_dllm.models import rope

Fields = Mapping[str, Any]

_LARGEST = 2**31 - 1
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": (
        "an integer from 1",
        lambda x: type(x) is int and 1 <= x <= _LARGEST,
    ),
    "number": (
        "a number from 0, below 1",
        lambda x: type(x) in (int, float) and 0 <= x < 1,
    ),
    "flag": ("true or false", lambda x: isinstance(x, bool)),
}


@dataclass(frozen=True)
class Read:
    """A field that the model is built from.

    Attributes:
        kind: a key of ``KINDS``.
        default: of a file without the field; a function computes it from the others.
        says: the default in words, where it is a function or None.
        is_needed: a file without the field is refused. The published default is not
            known, and another one would give wrong logits.
    """

    kind: str
    default: Any
    says: str = ""
    is_needed: bool = False


@dataclass(frozen=True)
class Only:
    """A field that is refused unless it has one of the values that we compute.

    Attributes:
        values: the values; a function computes one from the other fields. A file
            without the field, or with null, has the first.
        other: the effect of any other value.
    """

    values: tuple[Any, ...]
    other: str


@dataclass(frozen=True)
class Ignored:
    """A field without an effect on the forward."""

    why: str


Rule = Read | Only | Ignored


@dataclass(frozen=True)
class Table:
    """The fields of one family.

    Attributes:
        rules: by the field's name in config.json.
        model_types: for which transformers, or we, have the config class.
        rope_kinds: what the published code knows of ``rope_scaling``.
        theta: the published default of ``rope_theta``.
        needs_theta: as ``Read.is_needed``.
        hidden, layers, heads, kv_heads, positions: this family's names of the sizes.
    """

    rules: dict[str, Rule]
    model_types: tuple[str, ...]
    rope_kinds: tuple[str, ...]
    theta: float
    needs_theta: bool = False
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    positions: str = "max_position_embeddings"


_TRAINING = Ignored("training alone uses it")
_CACHE = Ignored("the server has its own KV cache")
_OURS = Ignored("remote code is never loaded; the module is ours")
_VERSION = Ignored("says who wrote the file")


def _all_full(fields: Fields) -> list[str]:
    """full_attention in each layer"""
    layers = fields.get("num_hidden_layers") or fields["n_layers"]
    return ["full_attention"] * int(layers)


_EVERYWHERE: dict[str, Rule] = {
    "attention_dropout": _TRAINING,
    "auto_map": _OURS,
    "initializer_range": _TRAINING,
    "pretraining_tp": Ignored("the products are the same in one piece"),
    "transformers_version": _VERSION,
    "use_cache": _CACHE,
    # Other architectures compute these. The published code of a family without such a
    # field ignores it, but its author has meant it.
    "alibi": Only((False,), "another encoding of positions"),
    "attn_logit_softcapping": Only((None,), "capped scores"),
    "attention_multiplier": Only((None,), "scaled scores"),
    "clip_qkv": Only((None,), "clamped queries, keys and values"),
    "embedding_multiplier": Only((None, 1), "scaled embeddings"),
    "embedding_scale": Only((None, 1), "scaled embeddings"),
    "final_logit_softcapping": Only((None,), "capped logits"),
    "layer_types": Only((_all_full,), "layers that see a part of the canvas"),
    "logit_scale": Only((None, 1), "scaled logits"),
    "logits_scaling": Only((None, 1), "scaled logits"),
    "partial_rotary_factor": Only((None, 1), "a rotation of a part of each head"),
    "query_pre_attn_scalar": Only((None,), "scaled scores"),
    "residual_multiplier": Only((None, 1), "scaled residuals"),
    "rotary_pct": Only((None, 1), "a rotation of a part of each head"),
    "scale_embeddings": Only((False,), "scaled embeddings"),
    "sliding_window": Only((None,), "attention to a part of the canvas"),
    "use_parallel_residual": Only((False,), "another order of the block"),
    "use_qk_norm": Only((False,), "norms of queries and keys"),
    "use_sliding_window": Only((False,), "attention to a part of the canvas"),
}
_NO_EXPERTS: dict[str, Rule] = {
    name: Only((None, 0), "experts")
    for name in ("num_experts", "num_local_experts", "n_routed_experts")
}

_PLAIN_BLOCK: dict[str, Rule] = {
    "hidden_act": Only(("silu", "swish"), "another activation"),
    "mlp_bias": Only((False,), "biases in the MLP"),
}
_NO_BIAS = Only((False,), "biases in attention")
_QWEN_WINDOWS: dict[str, Rule] = {
    name: Ignored("use_sliding_window is false")
    for name in ("sliding_window", "max_window_layers")
}


def _llama_sizes(
    hidden: int, layers: int, heads: int, mlp: int, vocab: int, positions: int
) -> dict[str, Rule]:
    """The sizes under Llama's names, with the defaults of the published class."""
    return {
        "vocab_size": Read("size", vocab),
        "hidden_size": Read("size", hidden),
        "intermediate_size": Read("size", mlp),
        "num_hidden_layers": Read("size", layers),
        "num_attention_heads": Read("size", heads),
        "num_key_value_heads": Read(
            "size", lambda f: f["num_attention_heads"], "num_attention_heads"
        ),
        "max_position_embeddings": Read("size", positions),
    }


_TIE = Read("flag", None, "true if the weights have no head")
_HEAD_DIM = "hidden_size / num_attention_heads"


def _published_head_dim(fields: Fields) -> int:
    """hidden_size / num_attention_heads"""
    return int(fields["hidden_size"]) // int(fields["num_attention_heads"])


def _llada_kv_heads(fields: Fields) -> int:
    return 1 if fields.get("multi_query_attention") else int(fields["n_heads"])


_LLADA = Table(
    _EVERYWHERE
    | _NO_EXPERTS
    | {
        "d_model": Read("size", 768),
        "n_layers": Read("size", 12),
        "n_heads": Read("size", 12),
        "n_kv_heads": Read(
            "size", _llada_kv_heads, "n_heads; 1 with multi_query_attention"
        ),
        "multi_query_attention": Read("flag", None, "as n_kv_heads says"),
        "mlp_ratio": Read("size", 4),
        "mlp_hidden_size": Read(
            "size", lambda f: f["mlp_ratio"] * f["d_model"], "mlp_ratio * d_model"
        ),
        "vocab_size": Read("size", 50257),
        "embedding_size": Read("size", lambda f: f["vocab_size"], "vocab_size"),
        "max_sequence_length": Read("size", 1024),
        "rms_norm_eps": Read("number", 1e-5),
        "include_qkv_bias": Read("flag", False),
        "weight_tying": _TIE,
        "rope": Only((True,), "no rotation"),
        "layer_norm_type": Only(("rms",), "another norm"),
        "layer_norm_with_affine": Only((True,), "norms without weights"),
        "attention_layer_norm": Only((False,), "norms of queries and keys"),
        "include_bias": Only((False,), "biases in every layer"),
        "bias_for_layer_norm": Only((False,), "biases in the norms"),
        "activation_type": Only(("silu",), "another activation"),
        "block_type": Only(("llama",), "another block"),
        "block_group_size": Only((1,), "other tensor names"),
        "scale_logits": Only((False,), "scaled logits"),
        "input_emb_norm": Only((False,), "scaled embeddings"),
        "norm_after": Only((False,), "norms behind attention and MLP"),
        "alibi_bias_max": Ignored("alibi alone uses it"),
        "attention_layer_norm_with_affine": Ignored("attention_layer_norm uses it"),
        "layer_norm_eps": Ignored("the norm is RMS; rms_norm_eps is read"),
        "rope_full_precision": Ignored("rotations are computed in float32"),
        "flash_attention": Ignored("the launch flags choose the kernel"),
        "precision": Ignored("--dtype and the weights decide"),
        "init_device": _TRAINING,
        "init_fn": _TRAINING,
        "init_std": _TRAINING,
        "init_cutoff_factor": _TRAINING,
        "embedding_dropout": _TRAINING,
        "residual_dropout": _TRAINING,
    },
    model_types=("llada",),
    rope_kinds=("default",),
    theta=10000.0,
    hidden="d_model",
    layers="n_layers",
    heads="n_heads",
    kv_heads="n_kv_heads",
    positions="max_sequence_length",
)

_DREAM = Table(
    _EVERYWHERE
    | _NO_EXPERTS
    | _PLAIN_BLOCK
    | _QWEN_WINDOWS
    | _llama_sizes(4096, 32, 32, 22016, 151936, 32768)
    | {
        "rms_norm_eps": Read("number", 1e-6),
        "attention_bias": Read("flag", True),
        "tie_word_embeddings": _TIE,
        "head_dim": Only((_published_head_dim,), "heads of another size"),
        "qk_layernorm": Only((False,), "norms of queries and keys"),
    },
    model_types=("Dream",),
    rope_kinds=rope.ALL_TYPES,
    theta=10000.0,
)


def _all_experts(fields: Fields) -> list[int]:
    """1 in each layer"""
    return [1] * int(fields["num_hidden_layers"])


_LLADA_MOE = Table(
    _EVERYWHERE
    | _llama_sizes(2048, 16, 16, 1024, 157184, 8192)
    | {
        "intermediate_size": Ignored("expert_intermediate_size is read"),
        "dense_intermediate_size": Ignored("every layer has experts"),
        "expert_intermediate_size": Read("size", 1024),
        "num_experts": Read("size", 64),
        "num_experts_per_tok": Read("size", 8),
        "norm_topk_prob": Read("flag", False),
        "rms_norm_eps": Read("number", 1e-5),
        "tie_word_embeddings": _TIE,
        "attention_bias": _NO_BIAS,
        "head_dim": Only((_published_head_dim,), "heads of another size"),
        "hidden_act": Only(("silu", "swish"), "another activation"),
        "moe_layer_freq": Only((_all_experts, 1), "layers without experts"),
        "moe_router_enable_expert_bias": Only((False,), "biases in the router"),
        "moe_router_score_function": Only(("softmax",), "other scores of experts"),
        "qk_layernorm": Only((True,), "no norms of queries and keys"),
        "routed_scaling_factor": Only((1,), "scaled experts"),
        "router_num_group": Only((None, 0, 1), "groups of experts"),
        "router_topk_group": Only((None, 0, 1), "groups of experts"),
        "shared_expert_intermediate_size": Only((None, 0), "a shared expert"),
        "num_shared_experts": Only((None, 0), "a shared expert"),
        "first_k_dense_replace": Only((None, 0), "layers without experts"),
        "output_router_logits": _TRAINING,
        "router_aux_loss_coef": _TRAINING,
    },
    model_types=("llada", "llada_moe"),
    rope_kinds=rope.ALL_TYPES,
    theta=50000.0,
)

_DIFFULLAMA = Table(
    _EVERYWHERE
    | _NO_EXPERTS
    | _PLAIN_BLOCK
    | _llama_sizes(4096, 32, 32, 11008, 32000, 2048)
    | {
        "rms_norm_eps": Read("number", 1e-6),
        "head_dim": Read("size", _published_head_dim, _HEAD_DIM),
        "tie_word_embeddings": Read("flag", False),
        "attention_bias": _NO_BIAS,
    },
    model_types=("llama",),
    rope_kinds=rope.ALL_TYPES,
    theta=10000.0,
)


def _needed(rule: Rule) -> Rule:
    return replace(rule, is_needed=True) if isinstance(rule, Read) else rule


_ILLADA_SIZES = _llama_sizes(4096, 32, 32, 14336, 155136, 8192)
_ILLADA = Table(
    _EVERYWHERE
    | _NO_EXPERTS
    | _PLAIN_BLOCK
    | {name: _needed(rule) for name, rule in _ILLADA_SIZES.items()}
    | {
        "rms_norm_eps": Read("number", 1e-6, is_needed=True),
        # transformers' own default, which it leaves out of the files.
        "tie_word_embeddings": Read("flag", True),
        "attention_bias": _NO_BIAS,
        "head_dim": Only((_published_head_dim,), "heads of another size"),
        "layer_norm_eps": Only((None,), "another norm"),
        "qk_layernorm": Only((False,), "norms of queries and keys"),
        "resid_pdrop": _TRAINING,
    },
    model_types=("illada",),
    rope_kinds=("default",),
    theta=10000.0,
    needs_theta=True,
)

_A2D_LLAMA = replace(_DIFFULLAMA, model_types=("a2d-llama",))

_A2D_QWEN2 = Table(
    _EVERYWHERE
    | _NO_EXPERTS
    | _PLAIN_BLOCK
    | _QWEN_WINDOWS
    | _llama_sizes(4096, 32, 32, 22016, 151936, 32768)
    | {
        "rms_norm_eps": Read("number", 1e-6),
        "tie_word_embeddings": Read("flag", False),
        "attention_bias": Only((True,), "no biases in attention"),
        "head_dim": Read("size", _published_head_dim, _HEAD_DIM),
    },
    model_types=("a2d-qwen2",),
    rope_kinds=rope.ALL_TYPES,
    theta=10000.0,
)
_A2D_QWEN3 = Table(
    _A2D_QWEN2.rules
    | {
        "attention_bias": _NO_BIAS,
        "head_dim": Read("size", 128),
    },
    model_types=("a2d-qwen3",),
    rope_kinds=rope.ALL_TYPES,
    theta=10000.0,
)

TABLES: dict[str, Table] = {
    "LLaDAModelLM": _LLADA,
    "DreamModel": _DREAM,
    "LLaDAMoEModelLM": _LLADA_MOE,
    "LLaDAMoEModel": _LLADA_MOE,
    "DiffuLlamaModel": _DIFFULLAMA,
    "ILLaDAForCausalLM": _ILLADA,
    "A2DQwen3LMHeadModel": _A2D_QWEN3,
    "A2DQwen2LMHeadModel": _A2D_QWEN2,
    "A2DLlamaLMHeadModel": _A2D_LLAMA,
}
"""By the architecture that config.json or the launch line names."""
