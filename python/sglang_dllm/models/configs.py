"""Config classes of the checkpoints. Without them a launch would need remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from sglang_dllm.models.config_check import rope_of, with_defaults
from sglang_dllm.models.facts import architecture_in
from sglang_dllm.models.rope import FIELDS as ROPE_FIELDS
from sglang_dllm.models.rope import Rope, read_rope


class _Published:
    """Reads a config.json as the published config class does.

    Each class has an ``__init__`` of its own: transformers would give it another one.

    Attributes:
        family: the architecture of a file that names none.
    """

    family: ClassVar[str]

    def published(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with their defaults, without those of the rotary embedding.

        Theta and scaling become ``rope_parameters``, whichever fields had them.
        """
        self._given = dict(fields)
        filled = with_defaults(fields, self.family)
        filled.setdefault("architectures", [self.family])
        rotary = rope_of(filled, self.family)
        self.rope_parameters = rotary.to_dict()
        self.rope_theta = rotary.theta
        return {k: value for k, value in filled.items() if k not in ROPE_FIELDS}

    def update(self, config_dict: dict[str, Any]) -> None:
        """Override fields of the file, as ``--json-model-override-args`` does.

        Defaults may depend on such a field, so that all are read again.
        """
        type(self).__init__(self, **{**self._given, **config_dict})

    def to_dict(self) -> dict[str, Any]:
        """As transformers, without what is kept for ``update``."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {name: x for name, x in fields.items() if name != "_given"}


class LLaDAMoEConfig(_Published, PretrainedConfig):
    """config.json of LLaDA-MoE-7B-A1B.

    The published files have the ``model_type`` of the dense models, ``llada``.
    ``LLaDAConfig.from_dict`` passes them to this class.
    """

    model_type = "llada_moe"
    family = "LLaDAMoEModelLM"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


class LLaDAConfig(_Published, PretrainedConfig):
    """config.json of LLaDA-8B, LLaDA-1.5 and d3LLM-LLaDA (OLMo's field names)."""

    model_type = "llada"
    family = "LLaDAModelLM"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))
        # The embedding and the head have embedding_size rows. An entropy over fewer
        # of them would not be the published one.
        self.vocab_size = self.embedding_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a LLaDA, or of a LLaDA-MoE, which has the same model_type."""
        if "MoE" in str(architecture_in(config_dict)):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class DreamConfig(_Published, PretrainedConfig):
    """config.json of Dream-v0, Dream-Coder, DiffuCoder and d3LLM-Dream."""

    model_type = "Dream"
    family = "DreamModel"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


class ILLaDAConfig(_Published, PretrainedConfig):
    """config.json of iLLaDA-8B Base and Instruct."""

    model_type = "illada"
    family = "ILLaDAForCausalLM"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


class A2DQwen3Config(_Published, PretrainedConfig):
    """config.json of a Qwen3 that the dllm toolkit has made bidirectional."""

    model_type = "a2d-qwen3"
    family = "A2DQwen3LMHeadModel"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


class A2DQwen2Config(_Published, PretrainedConfig):
    """The same of a Qwen2 or Qwen2.5."""

    model_type = "a2d-qwen2"
    family = "A2DQwen2LMHeadModel"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


class A2DLlamaConfig(_Published, PretrainedConfig):
    """The same of a Llama."""

    model_type = "a2d-llama"
    family = "A2DLlamaLMHeadModel"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**self.published(fields))


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


def rope_of_config(config: Any) -> Rope:
    """The rotary embedding of a config object, ours or transformers' own.

    Raises:
        ConfigError: ``--json-model-override-args`` replaced the object that has theta.
    """
    given = dict(config.rope_parameters)
    # Transformers' class has this attribute only where an override has set it.
    theta = getattr(config, "rope_theta", None)
    if theta is not None:
        given["rope_theta"] = theta
    return read_rope({"rope_parameters": given}, None, config.max_position_embeddings)


def register_configs() -> None:
    """Make transformers' AutoConfig know our model types."""
    for config in (
        LLaDAConfig,
        LLaDAMoEConfig,
        DreamConfig,
        ILLaDAConfig,
        A2DQwen3Config,
        A2DQwen2Config,
        A2DLlamaConfig,
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
