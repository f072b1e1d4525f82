"""SGLang's DllmConfig for a full-attention model: decided once per process."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.dllm.config import DllmConfig

from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.config.server import load_decode_config
from sglang_dllm.models.facts import FAMILIES, ModelFacts

SGLANG_NAME = "sglang_dllm"
"""What SGLang's table of algorithms calls ours, all of which one object runs: a
third party's algorithm may have the name of one of SGLang's own."""


class FullAttnDllmConfig(DllmConfig):
    """A dLLM whose every forward is a prefill of whole canvases.

    Attributes:
        needs_full_prefill: True; SGLang's own block-causal models have no such field.
        decode: what requests are decoded with.
        facts: what the checkpoint's config says (mask id, EOS ids, vocabulary).
    """

    needs_full_prefill = True

    def __init__(
        self,
        decode: DecodeConfig,
        facts: ModelFacts,
        max_reqs: int,
        page_size: int,
    ) -> None:
        super().__init__(
            algorithm=SGLANG_NAME,
            algorithm_config={},
            # SGLang's own models have blocks of one size; with us it only bounds the
            # page size from above, and no page size is wrong.
            block_size=page_size,
            mask_id=facts.mask_id,
            max_running_requests=max_reqs,
            # Per-request decoding state travels from round to round on the
            # request, which SGLang does in this mode only.
            first_done_first_out_mode=True,
        )
        self.decode = decode
        self.facts = facts
        # Completed by the scheduler, which has a tokenizer.
        self.complete_facts: ModelFacts | None = None


def hf_config_of(server_args: Any) -> Any:
    """The checkpoint's Hugging Face config."""
    return ModelConfig.from_server_args(
        server_args,
        model_path=server_args.model_path,
        model_revision=server_args.revision,
    ).hf_config


def is_full_attention(hf_config: Any) -> bool:
    architectures = getattr(hf_config, "architectures", None) or [None]
    return architectures[0] in FAMILIES


@lru_cache(maxsize=8)
def _decode_config(algorithm: str, architecture: str, path: str | None) -> DecodeConfig:
    return load_decode_config(algorithm, FAMILIES[architecture], path)


def decode_config(server_args: Any, hf_config: Any) -> DecodeConfig:
    """What requests are decoded with, from flags and YAML.

    Raises:
        ConfigError: one of them is wrong.
    """
    return _decode_config(
        server_args.dllm_algorithm,
        hf_config.architectures[0],
        server_args.dllm_algorithm_config,
    )


def full_attn_config(server_args: Any, hf_config: Any) -> FullAttnDllmConfig:
    """The configuration of a full-attention model, from flags, YAML and checkpoint.

    Raises:
        ConfigError: a flag, the YAML file or the checkpoint's config is wrong.
    """
    return FullAttnDllmConfig(
        decode_config(server_args, hf_config),
        ModelFacts.from_hf_config(hf_config),
        # Only a hint for SGLang's buffers; admission asks the scheduler's own limit.
        max_reqs=server_args.max_running_requests or 1,
        page_size=server_args.page_size or 1,
    )
