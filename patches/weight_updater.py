"""sglang.srt.managers.scheduler_components.weight_updater

Upstream: its own CUDA graphs survive an update, or it captures them again.
Ours: the graphs of a full-attention model are dropped before its weights or its KV
pool change, with no forward in flight (``runtime.rounds``). They are captured again
when the change is over.
Goes when: upstream tells a dLLM algorithm that the weights change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.patches.dllm_scheduler import is_ours
from sglang_dllm.upstream.hooks import Hook

_MANAGER = (
    "sglang.srt.managers.scheduler_components.weight_updater"
    ".SchedulerWeightUpdaterManager"
)

CHANGES = {
    "update_weights_from_disk": True,
    "update_weights_from_distributed": False,
    "update_weights_from_tensor": False,
    "update_weights_from_ipc": False,
    "release_memory_occupation": False,
    "resume_memory_occupation": True,
}
"""The methods that change weights or pool, and whether such a call is a change of its
own. The others are called many times in a row."""


def _hook(name: str, is_whole: bool) -> Hook:
    def change(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
        scheduler = manager.scheduler
        if not is_ours(scheduler):
            return original(manager, recv_req)
        from sglang_dllm.runtime.rounds import (
            after_weights_change,
            before_weights_change,
        )

        before_weights_change(scheduler)
        result = original(manager, recv_req)
        if is_whole:
            after_weights_change(scheduler)
        return result

    return Hook(
        target=f"{_MANAGER}.{name}",
        fn=change,
        why="a captured graph reads the weights and the pool where they were",
        contract=("self", "recv_req"),
        remove_when="upstream tells a dLLM algorithm that the weights change",
    )


HOOKS = tuple(_hook(name, is_whole) for name, is_whole in CHANGES.items())
