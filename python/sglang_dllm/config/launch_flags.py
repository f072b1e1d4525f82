"""SGLang's launch flags for a full-attention model: refused, or set.

This runs early in SGLang's own resolution of its flags. A value differs from the
field's default only where the user gave it. SGLang derives memory shares, graph capture
and buffers later, from the values that are set here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from sglang_dllm.attention.backends import BACKENDS
from sglang_dllm.config.dtype import settle_dtype
from sglang_dllm.config.refused_flags import HARMLESS, UNCHECKED, reason_against
from sglang_dllm.config.server import load_decode_config
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.models.tokenizers import plain_tokenizer_path

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 32
DEFAULT_QUEUED_PER_RUNNING = 32
"""Requests that may wait for each one that may run, without --max-queued-requests."""

ATTENTION_BACKENDS = tuple(backend.flag for backend in BACKENDS)

KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3")


def require_algorithm(server_args: Any, architecture: str) -> None:
    """Refuse to serve a model of ours as if it were autoregressive.

    Raises:
        ConfigError: there is no ``--dllm-algorithm``.
    """
    if server_args.dllm_algorithm is None:
        raise ConfigError(
            f"{architecture} is a diffusion model: add --dllm-algorithm with one of "
            f"{', '.join(algorithms())}"
        )


def trust_no_checkpoint(server_args: Any) -> None:
    """Turn --trust-remote-code off: no Python file of a checkpoint may run.

    Configs, models and tokenizers are ours or transformers' own. With the flag,
    transformers would take those of the folder for a Llama, and in a process without
    our plugin for any model.
    """
    server_args.trust_remote_code = False


def most_queued(flags: Any) -> int:
    """Requests that may wait in a server, over all data-parallel ranks.

    Args:
        flags: in effect. The flag of the queue stays None where the user gave none:
            the Python engine has no client that could come back, and so no bound.
    """
    most = flags.max_queued_requests
    if most is None:
        running = flags.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS
        most = DEFAULT_QUEUED_PER_RUNNING * running
    return int(most * flags.dp_size)


def settle_launch_flags(
    server_args: Any, architecture: str, given: Mapping[str, Any]
) -> None:
    """Refuse flags that have no use, then set the values that canvases need.

    Args:
        server_args: the flags as the user gave them, read and written here.
        given: the flags that the user gave, with their values.

    Raises:
        ConfigError: one line naming flag, value and what is allowed.
    """
    require_algorithm(server_args, architecture)
    load_decode_config(
        server_args.dllm_algorithm,
        FAMILIES[architecture],
        server_args.dllm_algorithm_config,
    )
    _refuse(server_args, architecture, given)
    if (server_args.max_queued_requests or 0) < 0:
        raise ConfigError(
            f"--max-queued-requests={server_args.max_queued_requests} is not allowed; "
            "expected 0 or more"
        )
    settle_dtype(server_args)
    _check_attention_backend(server_args, architecture)
    if server_args.max_running_requests is None:
        # SGLang's own default for dLLMs is one request at a time.
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
    server_args.disable_radix_cache = True
    server_args.disable_overlap_schedule = True
    _settle_graphs(server_args)
    server_args.chunked_prefill_size = -1
    if not server_args.skip_tokenizer_init:
        server_args.tokenizer_path = plain_tokenizer_path(
            server_args.tokenizer_path or server_args.model_path, server_args.revision
        )
    logger.info(
        "%s: prefix cache, chunked prefill and overlap schedule are off; "
        "up to %d canvases run at once",
        architecture,
        server_args.max_running_requests,
    )


def _settle_graphs(server_args: Any) -> None:
    """Turn SGLang's own CUDA graphs off.

    Ours (``runtime.graphs``) follow ``disable_decode_cuda_graph`` and the batch sizes
    of SGLang's decode phase.
    """
    backend = server_args.cuda_graph_backend_decode
    if backend not in (None, "full", "disabled"):
        raise ConfigError(
            f"--cuda-graph-backend-decode={backend!r} has no use: graphs of windows "
            "are whole; expected full or disabled"
        )
    is_off = server_args.disable_cuda_graph or backend == "disabled"
    server_args.disable_decode_cuda_graph |= is_off
    server_args.disable_cuda_graph = True
    # The flag of a phase overrides the flag of all phases.
    server_args.cuda_graph_backend_decode = "disabled"
    server_args.cuda_graph_backend_prefill = "disabled"


def _refuse(server_args: Any, architecture: str, given: Mapping[str, Any]) -> None:
    rust_server = os.environ.get("SGLANG_RUST_SERVER", "")
    if rust_server.lower() in ("true", "1", "yes", "y"):
        raise ConfigError(
            f"SGLANG_RUST_SERVER={rust_server!r} has no use for {architecture}: "
            f"{UNCHECKED}; leave it out"
        )
    if not server_args.dllm_fdfo:
        raise ConfigError(
            f"--no-dllm-fdfo has no use for {architecture}: a canvas always leaves "
            "the batch as soon as it is finished"
        )
    for name, value in given.items():
        reason = reason_against(name)
        if reason is not None and (name, value) not in HARMLESS:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag}={value!r} has no use for {architecture}: {reason}; "
                "leave it out"
            )


def _check_attention_backend(server_args: Any, architecture: str) -> None:
    for name in (
        "attention_backend",
        "prefill_attention_backend",
        "decode_attention_backend",
    ):
        value = getattr(server_args, name)
        if value is not None and value not in ATTENTION_BACKENDS:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag}={value!r} does not serve {architecture}; expected one of "
                f"{', '.join(ATTENTION_BACKENDS)}"
            )
    if server_args.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(
            f"--kv-cache-dtype={server_args.kv_cache_dtype!r} does not serve "
            f"{architecture}; expected one of {', '.join(KV_CACHE_DTYPES)}"
        )
    is_float32 = server_args.dtype in ("float32", "float")
    if server_args.attention_backend == "flashinfer" and is_float32:
        raise ConfigError(
            f"--dtype={server_args.dtype!r} needs --attention-backend triton or "
            "torch_native: FlashInfer computes in float16 or bfloat16"
        )
    if server_args.attention_backend is None and server_args.device == "cuda":
        server_args.attention_backend = "triton" if is_float32 else "flashinfer"
