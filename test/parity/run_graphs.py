"""Windows in graphs whose capture is pretended, on the demo model in this process.

Prints JSON: of each case, ids decoded eagerly and through graphs, and the buckets. A
process of its own: SGLang's parallel state is global.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from in_process import InProcess

from sglang_dllm.forward_plan import ForwardPlan
from sglang_dllm.scheduling.graphs import Limits, Run, WindowGraphs

REQUESTS = [
    (list(range(5, 30)), 60, "FullAttnMultiBlock", {"cache": "dual", "block_size": 16}),
    (list(range(9, 20)), 45, "FastDLLM", {"cache": "vicinity", "block_size": 8}),
    (list(range(7, 70)), 33, "Credit", {"cache": "prefix", "block_size": 16}),
]


class Pretended:
    """A capture that runs the forward again at each replay, into the same tensor."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Run) -> Run:
        self.num_captured += 1
        out = run()
        out.zero_()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return out.copy_(run())

        return replay


def fails(run: Run) -> Run:
    """A capture that runs out of memory."""
    run()
    raise RuntimeError("out of memory")


class Attention:
    """Plans nothing: on a CPU each layer reads the current plan."""

    plans: list[ForwardPlan]

    def plan(self, plan: ForwardPlan, graph: bool = False) -> None:
        assert graph
        assert len(set(plan.lens)) == 1


def decode(process: InProcess, asks: list[Any]) -> list[list[int]]:
    canvases = [
        process.add(prompt, length, algorithm, options)
        for prompt, length, algorithm, options in asks
    ]
    while process.requests:
        process.run_round()
    return [canvas.ids.tolist() for canvas in canvases]


def main() -> None:
    from sglang_dllm.demo import demo_path

    process = InProcess(str(demo_path()))
    cases = {"alone": REQUESTS[:1], "two": REQUESTS[:2], "three": REQUESTS}
    exact = (REQUESTS[0][0], 40, "LLaDA", {})
    cases["with one that has no cache"] = [*REQUESTS, exact]
    found = {}
    for name, asks in cases.items():
        process.rounds.graphs = None
        eager = decode(process, asks)
        capture = Pretended()
        process.rounds.graphs = graphs = WindowGraphs(
            process.runner.model,
            Attention(),
            process.runner.attn_backend,
            Limits(batch_sizes=(1, 4), windows=(32, 64)),
            capture,
        )
        found[name] = {
            "eager": eager,
            "graphs": decode(process, asks),
            "buckets": sorted(graphs._graphs),
            **vars(capture),
        }
    process.rounds.graphs = graphs = WindowGraphs(
        process.runner.model,
        Attention(),
        process.runner.attn_backend,
        Limits(batch_sizes=(4,), windows=(64,)),
        fails,
    )
    found["without memory"] = {
        "eager": found["three"]["eager"],
        "graphs": decode(process, REQUESTS),
        "buckets": list(graphs._graphs),
    }
    # The last line; SGLang prints what it likes before it.
    print(json.dumps(found))


if __name__ == "__main__":
    main()
