"""Config classes of the checkpoints. Without them a launch would need remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from sglang_dllm.errors import ConfigError

LLADA_MOE_ARCHITECTURES = ("LLaDAMoEModelLM", "LLaDAMoEModel")


class LLaDAMoEConfig(PretrainedConfig):
    """config.json of LLaDA-MoE-7B-A1B.

    The published files have the ``model_type`` of the dense models, ``llada``.
    ``LLaDAConfig.from_dict`` passes them to this class.
    """

    model_type = "llada_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        norm_topk_prob: bool | None = None,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_key_value_heads
            if num_key_value_heads is not None
            else num_attention_heads
        )
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = bool(norm_topk_prob)
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        # SGLang adds this field to a number if it exists, which fails for null.
        if kwargs.get("shared_expert_intermediate_size") is None:
            kwargs.pop("shared_expert_intermediate_size", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class LLaDAConfig(PretrainedConfig):
    """config.json of LLaDA-8B, LLaDA-1.5 and d3LLM-LLaDA (OLMo's field names)."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int = 4096,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads if n_kv_heads is not None else n_heads
        self.mlp_hidden_size = mlp_hidden_size or mlp_ratio * d_model
        self.max_sequence_length = max_sequence_length
        # The embedding and the head have embedding_size rows. An entropy over fewer
        # of them would not be the published one.
        self.vocab_size = embedding_size or vocab_size
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.weight_tying = weight_tying
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a LLaDA, or of a LLaDA-MoE, which has the same model_type."""
        if (config_dict.get("architectures") or [None])[0] in LLADA_MOE_ARCHITECTURES:
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class DreamConfig(PretrainedConfig):
    """config.json of Dream-v0, Dream-Coder, DiffuCoder and d3LLM-Dream."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_key_value_heads
            if num_key_value_heads is not None
            else num_attention_heads
        )
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        super().__init__(**kwargs)


_KEPT = {
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
    "intermediate_size": "original_intermediate_size",
}
"""The fields in which SGLang keeps the sizes that it has changed."""


def published_size(config: Any, field: str) -> int:
    """A size as the checkpoint's config.json has it.

    With ranks on a CPU, SGLang pads the sizes in the config to what its own CPU kernels
    need. Our layers split or repeat the real ones, as they do on a GPU.

    Args:
        field: the name in Llama's config.
    """
    size: int = getattr(config, _KEPT[field], None) or getattr(config, field)
    return size


def check_fields(
    config: Any, architecture: str, required: Mapping[str, object]
) -> None:
    """Refuse a config that our module would compute wrongly.

    Args:
        required: the one supported value of each field. An absent field and null are
            supported too.

    Raises:
        ConfigError: names the field, its value and the supported value.
    """
    for field, wanted in required.items():
        found = getattr(config, field, wanted)
        if found is not None and found != wanted:
            raise ConfigError(
                f"config.json: {field}={found!r} is not supported for "
                f"{architecture}; expected {wanted!r}"
            )


def register_configs() -> None:
    """Make transformers' AutoConfig know our model types."""
    AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
    AutoConfig.register("llada_moe", LLaDAMoEConfig, exist_ok=True)
    AutoConfig.register("Dream", DreamConfig, exist_ok=True)
