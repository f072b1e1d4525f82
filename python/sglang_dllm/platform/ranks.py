"""Several ranks on one CPU: what SGLang reads of the environment.

SGLang knows a CPU with ranks as its own CPU engine: a rank is bound to a NUMA node, and
ranks share memory through sgl-kernel. Plain torch needs neither. The ranks talk through
gloo, SGLang's choice for this device.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

from sglang_dllm.upstream.compat import num_thread_bindings

_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
_COREDUMP = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"


class RankBinding:
    """The CPU cores of each rank, for the processes that a launch will start.

    Without the variable SGLang allows one rank for each NUMA node. It asks for the
    cores even where nothing is bound to them.
    """

    def __init__(self) -> None:
        self._set_by_us: str | None = None

    def set_for(self, server_args: Any) -> None:
        """Set the variable for a launch, unless the user has set it.

        A second launch of the same process may have another number of ranks.
        """
        if os.environ.get(_BINDING) != self._set_by_us:
            return
        os.environ.pop(_BINDING, None)
        self._set_by_us = None
        num = num_thread_bindings(server_args)
        if num > 1:
            self._set_by_us = "|".join(_shares(sorted(os.sched_getaffinity(0)), num))
            os.environ[_BINDING] = self._set_by_us


def _shares(cores: list[int], num: int) -> list[str]:
    """``num`` lists of cores, as equal as possible; some overlap if there are few."""
    bounds = [len(cores) * i // num for i in range(num + 1)]
    return [
        ",".join(map(str, cores[start : max(end, start + 1)]))
        for start, end in pairwise(bounds)
    ]


def end_without_core_dump() -> None:
    """Let a launch end soon after a rank has failed.

    SGLang would wait a minute for a core dump that only CUDA writes.
    """
    os.environ.setdefault(_COREDUMP, "false")
