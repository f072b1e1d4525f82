"""SGLang's DllmConfig for a full-attention model. Each process decides it once."""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.dllm.config import DllmConfig

from sglang_dllm.config.parallel_limits import check_timeouts, check_tp_size
from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.config.server import load_decode_config
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.upstream.compat import in_effect, timeouts_are_shared

SGLANG_NAME = "sglang_dllm"
"""The name of ``FullAttnAlgorithm`` in SGLang's table of algorithms.

One object runs all of our algorithms, and none is in that table by its own name: a
third party's algorithm may be called like one of SGLang's."""


class FullAttnDllmConfig(DllmConfig):
    """The configuration of a full-attention dLLM.

    Attributes:
        needs_full_prefill: True; SGLang's own block-causal models have no such field.
        decode: the default algorithm and options, from flags and YAML.
        facts: mask id, EOS ids and vocabulary, from the checkpoint's config. The engine
            has them completed by the tokenizer.
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
            # SGLang refuses a page that is longer than the block. We have no block of
            # one size, and every page size works.
            block_size=page_size,
            mask_id=facts.mask_id,
            max_running_requests=max_reqs,
            # Only in this mode does SGLang keep dllm_algo_state on the request from
            # round to round.
            first_done_first_out_mode=True,
        )
        self.decode = decode
        self.facts = facts


def hf_config_of(server_args: Any) -> Any:
    """The checkpoint's Hugging Face config."""
    flags = in_effect(server_args)
    return ModelConfig.from_server_args(
        server_args, model_path=flags.model_path, model_revision=flags.revision
    ).hf_config


def full_attn_config(server_args: Any, hf_config: Any) -> FullAttnDllmConfig:
    """The configuration of a full-attention model, from flags, YAML and checkpoint.

    Raises:
        ConfigError: a flag, the YAML file or the checkpoint's config is wrong.
    """
    flags = in_effect(server_args)
    check_tp_size(flags, hf_config)
    check_timeouts(flags.tp_size, os.environ, timeouts_are_shared)
    return FullAttnDllmConfig(
        load_decode_config(
            flags.dllm_algorithm,
            FAMILIES[hf_config.architectures[0]],
            flags.dllm_algorithm_config,
        ),
        ModelFacts.from_hf_config(hf_config),
        # SGLang sizes buffers by it. Admission asks for the scheduler's own limit.
        max_reqs=flags.max_running_requests or 1,
        page_size=flags.page_size or 1,
    )
