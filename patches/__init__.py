"""Every edit of upstream SGLang: one hook a change.

A module holds the hooks on one upstream module; ``attention_backends`` holds those on
all attention backends, which one factory makes.

``python -m sglang_dllm.patches`` writes README.md from the hooks, and the contract with
SGLang from all of our code.
"""

from __future__ import annotations

from sglang_dllm.patches import (
    anthropic,
    attention_backends,
    dllm_config,
    dllm_scheduler,
    gpu_memory,
    http_server,
    load_inquirer,
    model_config,
    ollama,
    openai_chat,
    openai_responses,
    scheduler,
    server_args,
    server_processes,
    tokenizer_manager,
    weight_updater,
)
from sglang_dllm.upstream.hooks import HookSet

HOOKS = HookSet(
    hooks=(
        *dllm_config.HOOKS,
        *server_args.HOOKS,
        *gpu_memory.HOOKS,
        *dllm_scheduler.HOOKS,
        *scheduler.HOOKS,
        *load_inquirer.HOOKS,
        *weight_updater.HOOKS,
        *attention_backends.HOOKS,
        *tokenizer_manager.HOOKS,
        *http_server.HOOKS,
        *ollama.HOOKS,
        *anthropic.HOOKS,
        *openai_chat.HOOKS,
        *openai_responses.HOOKS,
        *model_config.HOOKS,
        *server_processes.HOOKS,
    )
)
