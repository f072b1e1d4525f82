"""Calls of hooked functions that are not about a full-attention model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from sglang_dllm.patches.weight_updater import CHANGES
from sglang_dllm.upstream.hooks import Hook


def llama() -> SimpleNamespace:
    return SimpleNamespace(architectures=["LlamaForCausalLM"], vocab_size=300)


def llama_manager() -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=llama()),
        server_args=SimpleNamespace(dllm_algorithm=None),
    )


def tokenized(rid: str) -> Any:
    """A request for the scheduler; no field but the id has a meaning."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    fields = TokenizedGenerateReqInput.__struct_fields__
    return TokenizedGenerateReqInput(**dict.fromkeys(fields, rid))


def off_arguments(hook: Hook) -> list[tuple[Any, ...]]:
    """Calls of a target that are not about a full-attention model."""
    name = hook.target.rsplit(".", 1)[1]
    args = SimpleNamespace(dllm_algorithm=None, hf_config=llama())
    theirs = SimpleNamespace(dllm_algorithm="LowConfidence", hf_config=llama())
    manager = llama_manager()
    schedulers = [
        SimpleNamespace(dllm_config=None),
        SimpleNamespace(dllm_config=SimpleNamespace(block_size=4)),
    ]
    serving = SimpleNamespace(
        tokenizer_manager=manager,
        openai_serving_chat=SimpleNamespace(tokenizer_manager=manager),
    )
    if "OllamaServing" in hook.target:
        return [(serving, manager)]
    if name == "_generate_stream_content":
        return [(serving, "content", 0, "request", "created")]
    if name == "_process_messages":
        return [(serving, SimpleNamespace(tool_choice="required"), False)]
    if name == "_make_request":
        return [(serving, "request", None, "tokenizer")]
    if name == "_process_tool_call_stream":
        return [(serving, 0, "delta", "parsers")]
    if ".entrypoints." in hook.target and hook.contract[0] == "self":
        return [(serving, *(one for one in hook.contract[1:] if one != "kwargs"))]
    calls: dict[str, list[tuple[Any, ...]]] = {
        "from_server_args": [(args,), (theirs,)],
        "init_diffusion_llm": [(s,) for s in schedulers],
        "get_new_batch_dllm": [(s, "running") for s in schedulers],
        "process_batch_result_dllm": [(s, "batch", "result") for s in schedulers],
        "pause_generation": [(s, "recv_req") for s in schedulers],
        "_abort_on_queued_limit": [(s, "recv_req") for s in schedulers],
        "init_grammar_manager": [(s,) for s in schedulers],
        "get_internal_state": [(s, "recv_req") for s in schedulers],
        **{
            name: [(SimpleNamespace(scheduler=s), "recv_req") for s in schedulers]
            for name in CHANGES
        },
        "get_loads": [
            (SimpleNamespace(tp_worker=SimpleNamespace(dllm_algorithm=algorithm)),)
            for algorithm in (None, "LowConfidence")
        ],
        "init_forward_metadata": [hook.contract],
        "forward_extend": [hook.contract],
        "_validate_one_request": [(manager, "obj", [1, 2])],
        "generate_request": [(manager, "obj", "request")],
        "abort_request": [(manager, "rid", False), (manager, "", True)],
        "create_abort_task": [(manager, SimpleNamespace(rid="a"))],
        "_dispatch_to_scheduler": [(manager, "obj"), (manager, tokenized("rid"))],
        "set_global_state": [(SimpleNamespace(tokenizer_manager=manager),)],
        "prepare_server_args": [(["--model-path", "x"],)],
        "json": [("request",)],
        "get_default_sampling_params": [(SimpleNamespace(hf_config=llama()),)],
        "launch_server": [(args,), (theirs,)],
        "kill_process_tree": [(os.getpid(), True), (os.getpid(), False), (1, True)],
        "sigterm_handler": [("handler", 15, None)],
        "sigterm_watchdog": [(manager,)],
        "__init__": [("scheduler", args, "port_args")],
        "run_event_loop": [("scheduler",)],
        "load_model": [("runner",)],
        "_handle_missing_default_values": [(args,), (theirs,)],
        "_handle_gpu_memory_settings": [(args, 1024), (theirs, 1024)],
    }
    return calls[name]
