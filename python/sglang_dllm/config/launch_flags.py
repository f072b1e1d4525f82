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
from sglang_dllm.config.server import load_decode_config
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.models.tokenizers import plain_tokenizer_path

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 32

ATTENTION_BACKENDS = tuple(backend.flag for backend in BACKENDS)

KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3")

_UNSHARED = "a canvas's KV belongs to its request alone"
_WINDOWS = "a forward computes windows of canvases, and there is no decode phase"
_UNCHECKED = "its processes load no plugin, so that no request would be checked"
_UNSUPPORTED = "it is not supported"
_VARYING = "forwards over whole canvases vary in length and are not captured"

# Fields of ServerArgs that have no use here, and the reason that the user is told. A
# version of SGLang may lack some of them.
_REFUSED = {
    "grpc_mode": _UNCHECKED,
    "smg_grpc_mode": _UNCHECKED,
    "tokenizer_worker_num": _UNCHECKED,
    "use_ray": _UNCHECKED,
    "encoder_only": _UNSUPPORTED,
    "chunked_prefill_size": "a canvas attends to all of itself and cannot be split",
    "enable_mixed_chunk": _WINDOWS,
    "enable_dynamic_chunking": _WINDOWS,
    "prefill_max_requests": _WINDOWS,
    "prefill_decode_interval": _WINDOWS,
    "enable_prefill_delayer": _WINDOWS,
    "enable_pdmux": _WINDOWS,
    "enable_two_batch_overlap": _UNSUPPORTED,
    "enable_single_batch_overlap": _UNSUPPORTED,
    "disaggregation_mode": "there is no decode phase",
    "speculative_algorithm": "there is no autoregressive decode to speculate on",
    "enable_hierarchical_cache": _UNSHARED,
    "enable_lmcache": _UNSHARED,
    "enable_flexkv": _UNSHARED,
    "enable_unified_cache_external_linker": _UNSHARED,
    "enable_session_radix_cache": _UNSHARED,
    "enable_streaming_session": _UNSHARED,
    "enable_hisparse": _UNSUPPORTED,
    "enable_unified_memory": _UNSUPPORTED,
    "pp_size": _UNSUPPORTED,
    "dcp_size": _UNSUPPORTED,
    "attn_cp_size": _UNSUPPORTED,
    "enable_dp_attention": "use --dp-size for data parallelism",
    "attn_dp_size": "use --dp-size for data parallelism",
    "enable_lora": _UNSUPPORTED,
    "lora_paths": _UNSUPPORTED,
    "uno_lora_path": _UNSUPPORTED,
    "enable_custom_logit_processor": _UNSUPPORTED,
    "enable_return_hidden_states": _UNSUPPORTED,
    "return_hidden_states_mode": _UNSUPPORTED,
    "enable_return_aux_hidden_states": _UNSUPPORTED,
    "aux_hidden_state_capture": _UNSUPPORTED,
    "enable_watermark": _UNSUPPORTED,
    "watermark_config": _UNSUPPORTED,
    "startup_weight_load_mode": _UNSUPPORTED,
    "is_embedding": "the model generates text",
    "enable_priority_scheduling": "a canvas cannot be preempted",
    "enable_torch_compile": _UNSUPPORTED,
    "cuda_graph_config": "use --cuda-graph-bs-decode and its like",
    "cuda_graph_backend_prefill": _VARYING,
    "cuda_graph_max_bs_prefill": _VARYING,
    "cuda_graph_bs_prefill": _VARYING,
    "cuda_graph_tc_compiler": _VARYING,
    "cuda_graph_max_seq_len_prefill": _VARYING,
    "cuda_graph_prefill_max_context": _VARYING,
    "disable_cuda_graph_padding": "windows are padded to the next captured size",
}

_HARMLESS = (("chunked_prefill_size", -1), ("cuda_graph_backend_prefill", "disabled"))
"""Refused fields with a value that changes nothing."""


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


def settle_launch_flags(
    server_args: Any, architecture: str, defaults: Mapping[str, Any]
) -> None:
    """Refuse flags that have no use, then set the values that canvases need.

    Args:
        server_args: the flags as the user gave them, read and written here.
        defaults: SGLang's default of each flag.

    Raises:
        ConfigError: one line naming flag, value and what is allowed.
    """
    require_algorithm(server_args, architecture)
    load_decode_config(
        server_args.dllm_algorithm,
        FAMILIES[architecture],
        server_args.dllm_algorithm_config,
    )
    _refuse(server_args, architecture, defaults)
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


def _refuse(server_args: Any, architecture: str, defaults: Mapping[str, Any]) -> None:
    rust_server = os.environ.get("SGLANG_RUST_SERVER", "")
    if rust_server.lower() in ("true", "1", "yes", "y"):
        raise ConfigError(
            f"SGLANG_RUST_SERVER={rust_server!r} has no use for {architecture}: "
            f"{_UNCHECKED}; leave it out"
        )
    if not server_args.dllm_fdfo:
        raise ConfigError(
            f"--no-dllm-fdfo has no use for {architecture}: a canvas always leaves "
            "the batch as soon as it is finished"
        )
    for name, reason in _REFUSED.items():
        value = getattr(server_args, name) if name in defaults else None
        if value in (defaults.get(name), None, False):
            continue
        if (name, value) in _HARMLESS:
            continue
        flag = "--" + name.replace("_", "-")
        raise ConfigError(
            f"{flag}={value!r} has no use for {architecture}: {reason}; leave it out"
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
