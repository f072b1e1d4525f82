"""Decodes with graphs that are recorded on the CPU, on the demo model in this process.

Prints JSON: for each case the ids decoded eagerly and through graphs, and counts. It
needs a process of its own, since SGLang's parallel state is global.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from benchmark.in_process import InProcess
from helpers.recorded_capture import RecordedCapture, grid_of, make_graphs
from sglang_dllm.runtime.graph_capture import Capture, Run
from sglang_dllm.runtime.graphs import CanvasGraphs

REQUESTS = [
    (list(range(5, 30)), 60, "FullAttnMultiBlock", {"cache": "dual", "block_size": 16}),
    (list(range(9, 20)), 45, "FastDLLM", {"cache": "vicinity", "block_size": 8}),
    (list(range(7, 70)), 33, "Credit", {"cache": "prefix", "block_size": 16}),
]
EXACT = [
    (list(range(9, 20)), 45, "FastDLLM", {}),
    (list(range(5, 30)), 60, "FullAttnMultiBlock", {}),
    (list(range(7, 27)), 33, "LLaDA", {"steps": 20}),
]
GUIDED = (list(range(5, 30)), 40, "LLaDA", {"steps": 20, "cfg_scale": 0.5})
GRID = grid_of((1, 4), (32, 64, 96))


class Launches:
    """Metrics that count launches by path and reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def launched(self, path: str, reason: str = "") -> None:
        self.counts[f"{path} {reason}".strip()] += 1


def decode(process: InProcess, asks: list[Any]) -> list[list[int]]:
    canvases = [process.add(*ask) for ask in asks]
    while process.requests:
        process.run_round()
    return [canvas.ids.tolist() for canvas in canvases]


def decode_ahead(process: InProcess, asks: list[Any]) -> list[list[int]]:
    """One more request every second round, with a forward in flight between rounds."""
    canvases = []
    for ask in asks:
        canvases.append(process.add(*ask, ignore_eos=True))
        process.run_round()
        process.run_round()
    while process.requests:
        process.run_round()
    return [canvas.ids.tolist() for canvas in canvases]


class FailsAt:
    """A capture that runs out of memory at its first calls."""

    def __init__(self, num_failing: int) -> None:
        self.num_failing = num_failing
        self.record = RecordedCapture()

    def __call__(self, run: Run) -> Run:
        self.num_failing -= 1
        if self.num_failing >= 0:
            run()
            raise RuntimeError("out of memory")
        return self.record(run)


def turn_on(
    process: InProcess, capture: Capture, **rounds: Any
) -> tuple[CanvasGraphs, Launches]:
    """New graphs of forwards, which the process uses from now on."""
    graphs = make_graphs(process.runner, process.facts, GRID, 128, capture)
    process.new_engine(graphs=graphs, **rounds)
    launches = process.model.metrics = Launches()  # type: ignore[assignment]
    return graphs, launches


def main() -> None:
    from sglang_dllm.demo import demo_path

    process = InProcess(str(demo_path()))
    cases: dict[str, list[Any]] = {
        "alone": REQUESTS[:1],
        "two": REQUESTS[:2],
        "three": REQUESTS,
        "exact": EXACT,
        "mixed": [*REQUESTS, EXACT[0]],
        "guided": [GUIDED, *REQUESTS[:1]],
    }
    found: dict[str, Any] = {}
    for name, asks in cases.items():
        process.new_engine()
        eager = decode(process, asks)
        capture = RecordedCapture()
        graphs, launches = turn_on(process, capture)
        num_captured = capture.num_captured
        found[name] = {
            "eager": eager,
            "graphs": decode(process, asks),
            "buckets": graphs.buckets,
            "launches": launches.counts,
            # No graph is captured while requests run.
            "captures": [num_captured, capture.num_captured],
        }
    process.new_engine()
    # A window of 32 tokens fills its bucket, and the next block starts behind it.
    asks = [*REQUESTS, (REQUESTS[0][0], 70, "FastDLLM", {"cache": "dual"})]
    eager = [ids for ask in asks for ids in decode_ahead(process, [ask])]
    ahead = []
    for num_steps in (1, 2):
        turn_on(process, RecordedCapture(), steps_per_round=num_steps, prelaunch=True)
        ahead += decode_ahead(process, asks)
    found["ahead"] = {"eager": 2 * eager, "graphs": ahead}
    graphs, launches = turn_on(process, FailsAt(2))
    found["without memory"] = {
        "eager": found["three"]["eager"],
        "graphs": decode(process, REQUESTS),
        "buckets": graphs.buckets,
        "launches": launches.counts,
    }
    # SGLang prints to the same stream, so the reader takes the last line.
    print(json.dumps(found))


if __name__ == "__main__":
    main()
