"""What SGLang's launch flags mean for a full-attention model, decided at launch."""

from __future__ import annotations

import logging
from typing import Any

from sglang_dllm.config import ALGORITHMS
from sglang_dllm.errors import ConfigError
from sglang_dllm.scheduling.dllm_config import full_attn_config

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 32

# Flags without a meaning here: attribute, value that leaves it off, flag, reason.
_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    (
        "dllm_fdfo",
        True,
        "--no-dllm-fdfo",
        "canvases always leave the batch as soon as they finish",
    ),
    (
        "enable_mixed_chunk",
        False,
        "--enable-mixed-chunk",
        "every forward is a prefill of whole canvases",
    ),
    ("pp_size", 1, "--pp-size", "pipeline parallelism is not supported"),
    ("speculative_algorithm", None, "--speculative-algorithm", "nothing is drafted"),
    ("disaggregation_mode", "null", "--disaggregation-mode", "there is no decode"),
    (
        "enable_hierarchical_cache",
        False,
        "--enable-hierarchical-cache",
        "a canvas's KV is never shared between requests",
    ),
    (
        "enable_lmcache",
        False,
        "--enable-lmcache",
        "a canvas's KV is never shared between requests",
    ),
    ("enable_lora", None, "--enable-lora", "LoRA adapters are not supported"),
    ("lora_paths", None, "--lora-paths", "LoRA adapters are not supported"),
    (
        "enable_dp_attention",
        False,
        "--enable-dp-attention",
        "use --dp-size for data parallelism",
    ),
    ("enable_return_hidden_states", False, "--enable-return-hidden-states", "unused"),
    ("is_embedding", False, "--is-embedding", "the model generates text"),
    ("skip_tokenizer_init", False, "--skip-tokenizer-init", "stop strings need text"),
)


def settle_launch_flags(server_args: Any, hf_config: Any) -> None:
    """Refuse flags without a meaning, then set what full prefills need.

    Raises:
        ConfigError: one line naming flag, value and what to do.
    """
    architecture = hf_config.architectures[0]
    if server_args.dllm_algorithm is None:
        raise ConfigError(
            f"{architecture} is a diffusion model: add --dllm-algorithm with one of "
            f"{', '.join(ALGORITHMS)}"
        )
    full_attn_config(server_args, hf_config)
    for attribute, off, flag, reason in _REFUSED:
        value = getattr(server_args, attribute, off)
        if value != off and value not in (None, False):
            raise ConfigError(
                f"{flag}={value!r} has no use for {architecture}: {reason}"
            )
        if off is True and value is False:
            raise ConfigError(f"{flag} has no use for {architecture}: {reason}")
    _refuse_chunks(server_args, architecture)
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
    server_args.disable_radix_cache = True
    server_args.disable_overlap_schedule = True
    server_args.chunked_prefill_size = -1
    _disable_cuda_graphs(server_args)
    logger.info(
        "%s: prefix cache, chunked prefill, overlap schedule and CUDA graphs are off; "
        "up to %d canvases run at once",
        architecture,
        server_args.max_running_requests,
    )


def _refuse_chunks(server_args: Any, architecture: str) -> None:
    """--chunked-prefill-size has a default; only a value the user gave is refused."""
    given = _given_chunk_size()
    if given is not None and given > 0:
        raise ConfigError(
            f"--chunked-prefill-size={given} has no use for {architecture}: a canvas "
            "attends to all of itself and cannot be split; leave it out or give -1"
        )


def _given_chunk_size() -> int | None:
    return None


def _disable_cuda_graphs(server_args: Any) -> None:
    """Prefills of varying length are not captured."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    server_args.cuda_graph_config.decode.backend = Backend.DISABLED
    server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
    server_args.disable_cuda_graph = True
