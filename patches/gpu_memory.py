"""sglang.srt.server_args: the step that derives the share of weights and KV pool

Upstream: reserves memory for its own CUDA graphs, which are off here.
Ours: the graphs of a full-attention model get theirs (``runtime.graph_memory``).
Goes when: upstream asks the model what to reserve. A newer SGLang has a place for a
step of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _handle_gpu_memory_settings(
    original: Callable[..., Any], server_args: Any, gpu_mem: Any
) -> Any:
    return _reserve(lambda flags: original(flags, gpu_mem), server_args)


def _reserve(derive: Callable[[Any], Any], server_args: Any) -> Any:
    """SGLang's step, then ours behind it.

    Args:
        derive: SGLang's step, a function of the record.
    """
    from sglang_dllm.patches import HOOKS

    if HOOKS.problem is not None:
        return derive(server_args)
    from sglang_dllm.config.server import decodes
    from sglang_dllm.upstream import compat
    from sglang_dllm.upstream.launch import architecture_of

    flags = compat.in_effect(server_args)
    algorithm = flags.dllm_algorithm
    if algorithm is None or not decodes(algorithm, architecture_of(flags)):
        return derive(server_args)
    given = flags.mem_fraction_static
    result = derive(server_args)
    capacity = compat.device_mebibytes(flags.device)
    if flags.device == "cuda" and capacity is not None:
        from sglang_dllm.runtime.graph_memory import MIB, reserve

        config = compat.model_config(server_args)
        compat.set_flags(
            server_args,
            lambda flags: reserve(flags, config, given, int(capacity * MIB)),
        )
    return result


def add_resolution_step() -> None:
    """Add the step to SGLang's resolution of its flags, where it takes such steps."""
    from sglang_dllm.upstream import compat

    compat.add_resolution_step("handle_gpu_memory_settings", _reserve)


HOOKS = (
    Hook(
        target="sglang.srt.server_args.ServerArgs._handle_gpu_memory_settings",
        fn=_handle_gpu_memory_settings,
        why="SGLang reserves no memory for the CUDA graphs of windows",
        contract=("self", "gpu_mem"),
        remove_when="upstream asks the model what to reserve",
        unless="sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        replaced_by={"0.5.23": "`register_resolution_hook`"},
    ),
)
