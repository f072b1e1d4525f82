"""SGLang's launch flags that a full-attention model refuses, and why.

A flag stands here if it would do nothing or break the server. Each version of SGLang
has some of them. Flags that only make another refused flag precise are covered by the
beginning of their name. docs/launch.md has the same list.
"""

from __future__ import annotations

_UNSHARED = "a canvas's KV belongs to its request alone"
_WINDOWS = "a forward computes windows of canvases, and there is no decode phase"
UNCHECKED = "its processes load no plugin, so that no request would be checked"
_UNSUPPORTED = "it is not supported"
_VARYING = "forwards over whole canvases vary in length and are not captured"
_NO_DECODE = "there is no decode phase"
_NOT_SPECULATED = "there is no autoregressive decode to speculate on"
_DP_SIZE = "use --dp-size for data parallelism"
_ONE_MACHINE = "a server runs on one machine"
_TEXT = "the model reads and writes text alone"
_OTHER_LAYERS = "the model has no layers of that kind"
_SAMPLERS = "the algorithm of --dllm-algorithm decides on tokens"

REFUSED = {
    "grpc_mode": UNCHECKED,
    "smg_grpc_mode": UNCHECKED,
    "smg_http_sidecar_port": UNCHECKED,
    "grpc_port": UNCHECKED,
    "tokenizer_worker_num": UNCHECKED,
    "detokenizer_worker_num": UNCHECKED,
    "enable_http_worker_reuseport": UNCHECKED,
    "use_ray": UNCHECKED,
    "encoder_only": _UNSUPPORTED,
    "nnodes": _ONE_MACHINE,
    "node_rank": _ONE_MACHINE,
    "chunked_prefill_size": "a canvas attends to all of itself and cannot be split",
    "enable_mixed_chunk": _WINDOWS,
    "enable_dynamic_chunking": _WINDOWS,
    "prefill_max_requests": _WINDOWS,
    "enable_pdmux": _WINDOWS,
    "enable_two_batch_overlap": _UNSUPPORTED,
    "enable_single_batch_overlap": _UNSUPPORTED,
    "num_continuous_decode_steps": "use steps_per_round of --dllm-algorithm-config",
    "prefill_only_disable_kv_cache": "the windows of a canvas read its KV cache",
    "enable_kv_cache_sharding": _UNSHARED,
    "enable_lmcache": _UNSHARED,
    "enable_flexkv": _UNSHARED,
    "enable_hierarchical_cache": _UNSHARED,
    "enable_unified_cache_external_linker": _UNSHARED,
    "enable_session_radix_cache": _UNSHARED,
    "enable_streaming_session": _UNSHARED,
    "enable_hisparse": _UNSUPPORTED,
    "enable_unified_memory": _UNSUPPORTED,
    "pp_size": _UNSUPPORTED,
    "dcp_size": _UNSUPPORTED,
    "enable_prefill_cp": _UNSUPPORTED,
    "enable_dp_attention": _DP_SIZE,
    "enable_dp_lm_head": _DP_SIZE,
    "attn_dp_size": _DP_SIZE,
    "moe_dp_size": _DP_SIZE,
    "enable_lora": _UNSUPPORTED,
    "max_lora_rank": _UNSUPPORTED,
    "max_loaded_loras": _UNSUPPORTED,
    "uno_lora_path": _UNSUPPORTED,
    "enable_custom_logit_processor": _UNSUPPORTED,
    "enable_return_hidden_states": _UNSUPPORTED,
    "return_hidden_states_mode": _UNSUPPORTED,
    "enable_return_aux_hidden_states": _UNSUPPORTED,
    "return_aux_hidden_state_layer_ids": _UNSUPPORTED,
    "aux_hidden_state_capture": _UNSUPPORTED,
    "enable_return_routed_experts": _UNSUPPORTED,
    "enable_return_indexer_topk": _UNSUPPORTED,
    "enable_watermark": _UNSUPPORTED,
    "watermark_config": _UNSUPPORTED,
    "startup_weight_load_mode": _UNSUPPORTED,
    "model_impl": "the plugin has the model",
    "sampling_backend": _SAMPLERS,
    "rl_on_policy_target": _SAMPLERS,
    "is_embedding": "the model generates text",
    "enable_multimodal": _TEXT,
    "enable_priority_scheduling": "a canvas cannot be preempted",
    "enable_torch_compile": _UNSUPPORTED,
    "cuda_graph_config": "use --cuda-graph-bs-decode and its like",
    "cuda_graph_tc_compiler": _VARYING,
    "disable_cuda_graph_padding": "windows are padded to the next captured size",
}
"""Names of fields of ServerArgs."""

REFUSED_BEGINNINGS = {
    "prefill_decode_interval": _WINDOWS,
    "prefill_delayer_": _WINDOWS,
    "enable_prefill_delayer": _WINDOWS,
    "tbo_": _UNSUPPORTED,
    "pp_": _UNSUPPORTED,
    "attn_cp_": _UNSUPPORTED,
    "cuda_graph_backend_prefill": _VARYING,
    "cuda_graph_max_bs_prefill": _VARYING,
    "cuda_graph_bs_prefill": _VARYING,
    "cuda_graph_max_seq_len_prefill": _VARYING,
    "cuda_graph_prefill_": _VARYING,
    "hicache_": _UNSHARED,
    "radix_": _UNSHARED,
    "lmcache_": _UNSHARED,
    "flexkv_": _UNSHARED,
    "unified_cache_": _UNSHARED,
    "disaggregation_": _NO_DECODE,
    "encoder_": _NO_DECODE,
    "speculative_": _NOT_SPECULATED,
    "decoupled_spec_": _NOT_SPECULATED,
    "lora_": _UNSUPPORTED,
    "max_lora": _UNSUPPORTED,
    "mm_": _TEXT,
    "mamba_": _OTHER_LAYERS,
    "linear_attn_": _OTHER_LAYERS,
    "dsa_": _OTHER_LAYERS,
    "triton_attention_": "the plugin has the kernels",
}
"""Beginnings of names of fields; a name in full is its own beginning."""

HARMLESS = (
    ("chunked_prefill_size", -1),
    ("cuda_graph_backend_prefill", "disabled"),
    ("model_impl", "sglang"),
)
"""Refused fields with a value that changes nothing."""


_FOLLOWS_ANOTHER = ("speculative_draft_model_quantization",)
"""SGLang 0.5.17 gives it the value of ``--quantization``, so that it tells nothing of
what the user gave."""


def reason_against(name: str) -> str | None:
    """Why a field of ServerArgs has no use here; None where it has."""
    if name in _FOLLOWS_ANOTHER:
        return None
    if name in REFUSED:
        return REFUSED[name]
    for beginning, reason in REFUSED_BEGINNINGS.items():
        if name.startswith(beginning):
            return reason
    return None
