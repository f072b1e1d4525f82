"""Every edit of upstream SGLang: one module per upstream module, one hook a change.

``python -m sglang_dllm.patches`` writes README.md from the hooks.
"""

from __future__ import annotations

from sglang_dllm.patches import (
    dllm_config,
    dllm_scheduler,
    flashinfer_backend,
    http_server,
    scheduler,
    server_args,
    tokenizer_manager,
    torch_native_backend,
    triton_backend,
)
from sglang_dllm.upstream.hooks import HookSet

HOOKS = HookSet(
    hooks=(
        *dllm_config.HOOKS,
        *server_args.HOOKS,
        *dllm_scheduler.HOOKS,
        *scheduler.HOOKS,
        *torch_native_backend.HOOKS,
        *flashinfer_backend.HOOKS,
        *triton_backend.HOOKS,
        *tokenizer_manager.HOOKS,
        *http_server.HOOKS,
    ),
    gate=dllm_config.GATE,
)
