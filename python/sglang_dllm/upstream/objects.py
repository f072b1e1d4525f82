"""The classes of SGLang's objects in our code, by the names that the code gives them.

Our code takes most objects of SGLang as ``Any``, because SGLang has few stable types to
name. ``uses`` reads from these tables which class a ``scheduler`` or a ``req`` has. An
annotation with a class of SGLang comes first.
"""

from __future__ import annotations

_ATTENTION = "sglang.srt.layers.attention"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_MODEL = "sglang.srt.model_executor"
_SCHEDULE_BATCH = "sglang.srt.managers.schedule_batch"

CLASSES = {
    "BaseTokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator",
    "DllmFlags": "sglang.srt.runtime_context",
    "FlashInferAttnBackend": f"{_ATTENTION}.flashinfer_backend",
    "FlashInferIndicesUpdaterPrefill": f"{_ATTENTION}.flashinfer_backend",
    "ForwardBatch": f"{_MODEL}.forward_batch_info",
    "GenerateReqInput": "sglang.srt.managers.io_struct",
    "GrammarManager": "sglang.srt.constrained.grammar_manager",
    "HybridAttnBackend": f"{_ATTENTION}.hybrid_attn_backend",
    "LogitsProcessorOutput": "sglang.srt.layers.logits_processor",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool",
    "ModelConfig": "sglang.srt.configs.model_config",
    "ModelRunner": f"{_MODEL}.model_runner",
    "ModelRunnerOutput": f"{_MODEL}.model_runner",
    "ParallelContext": "sglang.srt.runtime_context",
    "RadixAttention": "sglang.srt.layers.radix_attention",
    "Req": _SCHEDULE_BATCH,
    "ReqKvInfo": _SCHEDULE_BATCH,
    "ReqLogprob": _SCHEDULE_BATCH,
    "ReqToTokenPool": "sglang.srt.mem_cache.memory_pool",
    "SamplingParams": "sglang.srt.sampling.sampling_params",
    "ScheduleBatch": _SCHEDULE_BATCH,
    "SchedulePolicy": "sglang.srt.managers.schedule_policy",
    "Scheduler": "sglang.srt.managers.scheduler",
    "SchedulerMetricsCollector": "sglang.srt.observability.metrics_collector",
    "SchedulerMetricsReporter": f"{_COMPONENTS}.metrics_reporter",
    "SchedulerOutputStreamer": f"{_COMPONENTS}.output_streamer",
    "SchedulerReqTimeStats": "sglang.srt.observability.req_time_stats",
    "SchedulerWeightUpdaterManager": f"{_COMPONENTS}.weight_updater",
    "ServerArgs": "sglang.srt.server_args",
    "TokenizerManager": "sglang.srt.managers.tokenizer_manager",
    "TorchNativeAttnBackend": f"{_ATTENTION}.torch_native_backend",
    "TpModelWorker": "sglang.srt.managers.tp_worker",
    "TritonAttnBackend": f"{_ATTENTION}.triton_backend",
    "_GlobalState": "sglang.srt.entrypoints.http_server",
}
"""The module of each class below."""

NAMES = {
    "collector": "SchedulerMetricsCollector",
    "flags": "ServerArgs",
    "forward_batch": "ForwardBatch",
    "grammars": "GrammarManager",
    "manager": "TokenizerManager",
    "model_runner": "ModelRunner",
    "obj": "GenerateReqInput",
    "reporter": "SchedulerMetricsReporter",
    "req": "Req",
    "running_batch": "ScheduleBatch",
    "runner": "ModelRunner",
    "scheduler": "Scheduler",
    "server_args": "ServerArgs",
    "updater": "SchedulerWeightUpdaterManager",
}
"""The class of a parameter, a variable or an attribute of ours with this name."""

NAMES_IN = {
    "attention/base.py": {"layer": "RadixAttention", "pool": "MHATokenToKVPool"},
    "attention/flashinfer.py": {"backend": "FlashInferAttnBackend"},
    "attention/sdpa.py": {"backend": "TorchNativeAttnBackend"},
    "attention/triton.py": {"backend": "TritonAttnBackend"},
    "patches/attention_backends.py": {
        "layer": "RadixAttention",
        "self": "FlashInferAttnBackend TorchNativeAttnBackend TritonAttnBackend",
    },
    "runtime/graphs.py": {"upstream": "HybridAttnBackend"},
    "runtime/schedule_batch.py": {"owner": "Scheduler ModelRunner"},
}
"""Names that one file uses. A name may stand for objects of several classes."""

FIELDS = {
    "FlashInferAttnBackend.indices_updater_prefill": "FlashInferIndicesUpdaterPrefill",
    "ModelRunner.forward()": "ModelRunnerOutput",
    "ModelRunner.model_config": "ModelConfig",
    "ModelRunnerOutput.logits_output": "LogitsProcessorOutput",
    "Req.kv": "ReqKvInfo",
    "Req.logprob": "ReqLogprob",
    "Req.sampling_params": "SamplingParams",
    "Req.time_stats": "SchedulerReqTimeStats",
    "ScheduleBatch.reqs": "[Req",
    "Scheduler.metrics_collector": "SchedulerMetricsCollector",
    "Scheduler.metrics_reporter": "SchedulerMetricsReporter",
    "Scheduler.output_streamer": "SchedulerOutputStreamer",
    "Scheduler.policy": "SchedulePolicy",
    "Scheduler.req_to_token_pool": "ReqToTokenPool",
    "Scheduler.running_batch": "ScheduleBatch",
    "Scheduler.server_args": "ServerArgs",
    "Scheduler.token_to_kv_pool_allocator": "BaseTokenToKVPoolAllocator",
    "Scheduler.tp_worker": "TpModelWorker",
    "Scheduler.waiting_queue": "[Req",
    "Scheduler.weight_updater": "SchedulerWeightUpdaterManager",
    "TokenizerManager.model_config": "ModelConfig",
    "TokenizerManager.server_args": "ServerArgs",
    "TpModelWorker.model_runner": "ModelRunner",
    "_GlobalState.tokenizer_manager": "TokenizerManager",
    "in_effect()": "ServerArgs",
    "get_global_state()": "_GlobalState",
    "get_parallel()": "ParallelContext",
}
"""The class of an attribute, or of a result, of those classes. ``[`` is a sequence."""

OURS = frozenset({"canvas_attention"})
"""Attributes that we add to SGLang's objects."""

CALLED_BY_SGLANG = frozenset(
    {
        ("CanvasScheduleBatch", "is_dllm"),
        ("FinishEos", "to_json"),
        ("FullAttnAlgorithm", "run"),
        ("PaddedLinear", "apply"),
    }
)
"""Methods of ours that replace one of SGLang's class: class and method."""
