"""sglang.srt.dllm.config

Upstream: ``DllmConfig.from_server_args`` knows the mask id and block size of its own
block-causal models from a local table and rejects every other architecture.
Ours: full-attention architectures get their configuration from their checkpoint.
This is also the gate: it runs in the launching process and in every scheduler, only
with --dllm-algorithm, so every hook is verified here.
Goes when: upstream's table becomes a registry (models declare mask id, block size
and needs_full_prefill themselves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def require_contract(algorithm: str | None) -> None:
    """End the launch of an algorithm of ours where the contract is known as broken.

    Its name decides. The model's architecture and the resolved flags may be out of
    reach: nobody knows what is left of SGLang's shape.

    Raises:
        UpstreamContractError: the contract is broken, and the algorithm is ours.
    """
    from sglang_dllm.decoding.registry import algorithms
    from sglang_dllm.patches import HOOKS
    from sglang_dllm.upstream.launch import is_of_another_plugin

    if algorithm in algorithms() and not is_of_another_plugin(algorithm):
        HOOKS.verify()


def _from_server_args(original: Callable[..., Any], server_args: Any) -> Any:
    from sglang_dllm.patches import HOOKS

    if HOOKS.problem is not None:
        require_contract(server_args.dllm_algorithm)
        return original(server_args)
    from sglang_dllm.upstream import compat

    flags = compat.in_effect(server_args)
    if flags.dllm_algorithm is None:
        return original(server_args)
    from sglang_dllm.config.server import decodes
    from sglang_dllm.upstream.launch import architecture_of

    if not decodes(flags.dllm_algorithm, architecture_of(flags)):
        return original(server_args)
    HOOKS.verify()
    from sglang_dllm.runtime.dllm_config import full_attn_config, hf_config_of

    return full_attn_config(server_args, hf_config_of(server_args))


GATE = Hook(
    target="sglang.srt.dllm.config.DllmConfig.from_server_args",
    fn=_from_server_args,
    why="the table of dLLM architectures is a local variable; "
    "this is also where all hooks are verified",
    contract=("server_args",),
    remove_when="upstream lets models declare mask id, block size, full prefill",
    always=True,
)

HOOKS = (GATE,)
