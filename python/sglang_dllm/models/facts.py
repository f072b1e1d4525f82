"""Facts of the model architectures, one frozen row for each name.

Mask and EOS ids are not here. They come from the checkpoint's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sglang_dllm.errors import ConfigError

SamplerFamily = Literal["LLaDA", "Dream"]


@dataclass(frozen=True)
class Family:
    """Facts of one architecture that decoding depends on.

    Attributes:
        architecture: the name in config.json's ``architectures``.
        sampler_family: the published samplers and defaults that decode the model.
            Every algorithm that exists for both has different rules for each.
        shift: logits row ``i - shift`` predicts position i, and row 0 predicts
            position 0. It is 0 for LLaDA. It is 1 for Dream, which was initialised
            from an autoregressive model.
        eot_token: the token that ends a chat turn. To the samplers it is an ordinary
            token.
        mask_token: the mask in the vocabulary of a checkpoint whose files say nowhere
            that it is one.
    """

    architecture: str
    sampler_family: SamplerFamily
    shift: int
    eot_token: str | None = None
    mask_token: str | None = None


def _a2d(architecture: str, eot_token: str) -> Family:
    # The toolkit names the mask by this text whenever it reads a tokenizer.
    return Family(architecture, "LLaDA", 0, eot_token, mask_token="<|mask|>")


FAMILIES = {
    row.architecture: row
    for row in (
        Family("LLaDAModelLM", sampler_family="LLaDA", shift=0, eot_token="<|eot_id|>"),
        Family("DreamModel", sampler_family="Dream", shift=1, eot_token="<|im_end|>"),
        Family(
            "LLaDAMoEModelLM", sampler_family="LLaDA", shift=0, eot_token="<|role_end|>"
        ),
        Family(
            "LLaDAMoEModel", sampler_family="LLaDA", shift=0, eot_token="<|role_end|>"
        ),
        Family("DiffuLlamaModel", sampler_family="Dream", shift=1),
        # Its samplers are given the number 5. The tokenizer has this text there.
        Family(
            "ILLaDAForCausalLM", sampler_family="LLaDA", shift=0, mask_token="<[MASK]>"
        ),
        _a2d("A2DQwen3LMHeadModel", eot_token="<|im_end|>"),
        _a2d("A2DQwen2LMHeadModel", eot_token="<|im_end|>"),
        _a2d("A2DLlamaLMHeadModel", eot_token="<|eot_id|>"),
    )
}


def architecture_in(fields: Mapping[str, Any]) -> str | None:
    """The first architecture of a config.json.

    A file without architectures has that of its ``model_type``: the published config
    classes fill it in.
    """
    names = fields.get("architectures")
    if isinstance(names, list | tuple) and names:
        return str(names[0])
    if names:
        return None
    # Dense and MoE models of LLaDA have the same model_type.
    has_experts = fields.get("num_experts") is not None
    llada = "LLaDAMoEModelLM" if has_experts else "LLaDAModelLM"
    types = {
        "Dream": "DreamModel",
        "llada": llada,
        "llada_moe": "LLaDAMoEModelLM",
        "illada": "ILLaDAForCausalLM",
        "a2d-qwen3": "A2DQwen3LMHeadModel",
        "a2d-qwen2": "A2DQwen2LMHeadModel",
        "a2d-llama": "A2DLlamaLMHeadModel",
    }
    return types.get(str(fields.get("model_type")))


@dataclass(frozen=True)
class ModelFacts:
    """A family with the ids and sizes of one checkpoint.

    Attributes:
        eot_token_id: the id of ``Family.eot_token``. None before ``with_tokenizer``,
            or if the tokenizer has no such token.
        newline_ids: ids whose text is or ends with a newline. Empty before
            ``with_tokenizer``.
    """

    family: Family
    mask_id: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    eot_token_id: int | None = None
    newline_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> ModelFacts:
        """Read the facts from a checkpoint's config.

        Raises:
            ConfigError: the mask or EOS id is missing or outside the vocabulary.
        """
        family = FAMILIES[hf_config.architectures[0]]
        mask_id: Any = getattr(hf_config, "mask_token_id", None)
        eos = getattr(hf_config, "eos_token_id", None)
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        for field, value in [
            ("mask_token_id", mask_id),
            *(("eos_token_id", token) for token in eos_ids),
        ]:
            if not isinstance(value, int) or not 0 <= value < hf_config.vocab_size:
                raise ConfigError(
                    f"the checkpoint's config.json has {field}={value!r}; "
                    f"expected an id from 0 to {hf_config.vocab_size - 1}; "
                    "give it with --json-model-override-args"
                )
        return cls(family, mask_id, eos_ids, hf_config.vocab_size)

    def with_tokenizer(self, tokenizer: Any) -> ModelFacts:
        """These facts with the ids that only the tokenizer knows.

        Args:
            tokenizer: None where the checkpoint has none.
        """
        if tokenizer is None:
            return self
        vocabulary = tokenizer.get_vocab()
        return replace(
            self,
            eot_token_id=vocabulary.get(self.family.eot_token),
            newline_ids=_newline_ids(tokenizer, self.family.sampler_family),
        )

    def differences_from(self, tokenizer: Any) -> list[str]:
        """Ids of config.json that the tokenizer gives to other tokens, in words.

        A server with such ids answers, and a mask or an end of text looks like text.
        """
        names = (("mask_token", (self.mask_id,)), ("eos_token", self.eos_ids))
        lines = []
        for name, ids in names:
            token = getattr(tokenizer, f"{name}_id", None)
            if token is not None and token not in ids:
                lines.append(
                    f"config.json has {name}_id={', '.join(map(str, ids))}, but the "
                    f"tokenizer's {name} {getattr(tokenizer, name)!r} is {token}"
                )
        return lines


# AdaBlock-dLLM's delimiters in Dream's vocabulary: a newline, alone or after
# punctuation. In LLaDA's vocabulary the delimiter is the newline alone.
_QWEN_NEWLINES = (
    *(198, 271, 280, 319, 340, 382, 401, 532, 624, 630, 692, 698, 921, 1248, 1837),
    *(1939, 2219, 2533, 3276, 3876, 4894, 5267, 14750, 68327),
)


def _newline_ids(tokenizer: Any, sampler_family: SamplerFamily) -> tuple[int, ...]:
    if sampler_family == "Dream":
        found = [i for i in _QWEN_NEWLINES if i < len(tokenizer)]
        if all("\n" in tokenizer.decode([i]) for i in found) and found:
            return tuple(found)
    ids = tokenizer.encode("\n", add_special_tokens=False)
    # SentencePiece adds a space token before the newline, which is no delimiter.
    return tuple(i for i in ids if tokenizer.decode([i]) == "\n")
