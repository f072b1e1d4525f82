"""sglang.srt.dllm.mixin.scheduler

Upstream: schedules blocks of one size through a prefill adder, with a queue of its
own, a radix cache and a prefill or a decode phase.
Ours: a round is a few denoising steps of all active canvases (``runtime.rounds``).
Goes when: upstream has a scheduling interface per kind of dLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def is_ours(scheduler: Any) -> bool:
    """True if a scheduler serves a full-attention model."""
    return getattr(scheduler.dllm_config, "needs_full_prefill", False)


def _init_diffusion_llm(original: Callable[..., Any], scheduler: Any) -> Any:
    result = original(scheduler)
    if is_ours(scheduler):
        from sglang_dllm.runtime.rounds import engine_of

        # Here the CUDA graphs are captured, and the server is not ready yet.
        engine_of(scheduler)
    return result


def _get_new_batch_dllm(
    original: Callable[..., Any], scheduler: Any, running_batch: Any
) -> Any:
    if not is_ours(scheduler):
        return original(scheduler, running_batch)
    from sglang_dllm.runtime.rounds import next_round

    return next_round(scheduler, running_batch)


def _process_batch_result_dllm(
    original: Callable[..., Any], scheduler: Any, batch: Any, result: Any
) -> Any:
    if not is_ours(scheduler):
        return original(scheduler, batch, result)
    from sglang_dllm.runtime.rounds import finish_round

    return finish_round(scheduler, batch, result)


_MIXIN = "sglang.srt.dllm.mixin.scheduler.SchedulerDllmMixin"
_REMOVE_WHEN = "upstream has a scheduling interface per kind of dLLM"

HOOKS = (
    Hook(
        target=f"{_MIXIN}.init_diffusion_llm",
        fn=_init_diffusion_llm,
        why="the engine is built, and its CUDA graphs are captured, before the server "
        "says that it is ready",
        contract=("self",),
        remove_when="upstream lets a dLLM algorithm prepare itself at start-up",
    ),
    Hook(
        target=f"{_MIXIN}.get_new_batch_dllm",
        fn=_get_new_batch_dllm,
        why="upstream batches blocks of one size; ours are whole ragged canvases",
        contract=("self", "running_batch"),
        remove_when=_REMOVE_WHEN,
    ),
    Hook(
        target=f"{_MIXIN}.process_batch_result_dllm",
        fn=_process_batch_result_dllm,
        why="upstream emits finished blocks; ours emits the committed prefix",
        contract=("self", "batch", "result"),
        remove_when=_REMOVE_WHEN,
    ),
)
