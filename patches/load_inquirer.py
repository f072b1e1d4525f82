"""sglang.srt.managers.scheduler_components.load_inquirer

Upstream: the load of a rank counts the prompts of waiting requests.
Ours: it counts their canvases (``runtime.load``), so that the least load of routers and
of data-parallel ranks is the least work.
Goes when: upstream asks the dLLM algorithm what a waiting request will need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _get_loads(original: Callable[..., Any], inquirer: Any) -> Any:
    found = original(inquirer)
    algorithm = getattr(inquirer.tp_worker, "dllm_algorithm", None)
    if algorithm is None:
        return found
    from sglang_dllm.runtime.dllm_algorithm import FullAttnAlgorithm

    if not isinstance(algorithm, FullAttnAlgorithm):
        return found
    from sglang_dllm.runtime.load import true_load

    return true_load(found, inquirer)


HOOKS = (
    Hook(
        target="sglang.srt.managers.scheduler_components.load_inquirer."
        "SchedulerLoadInquirer.get_loads",
        fn=_get_loads,
        why="the load counts the prompts of waiting requests; a canvas needs its whole "
        "length from its first forward on",
        contract=("self",),
        remove_when="upstream asks the dLLM algorithm what a waiting request will need",
    ),
)
