"""Decodes with graphs that are recorded on the CPU, on the demo model in this process.

Prints JSON: for each case the ids decoded eagerly and through graphs, and the buckets.
It needs a process of its own, since SGLang's parallel state is global.
"""

from __future__ import annotations

import json
from typing import Any

from benchmark.in_process import InProcess
from helpers.recorded_capture import RecordedCapture, turn_graphs_on
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.runtime.graph_buckets import GraphLimits
from sglang_dllm.runtime.graph_capture import Capture, Run
from sglang_dllm.runtime.graphs import WindowGraphs

REQUESTS = [
    (list(range(5, 30)), 60, "FullAttnMultiBlock", {"cache": "dual", "block_size": 16}),
    (list(range(9, 20)), 45, "FastDLLM", {"cache": "vicinity", "block_size": 8}),
    (list(range(7, 70)), 33, "Credit", {"cache": "prefix", "block_size": 16}),
]

LIMITS = GraphLimits(batch_sizes=(1, 4), lengths=(32, 64))


def fails(run: Run) -> Run:
    """A capture that runs out of memory."""
    run()
    raise RuntimeError("out of memory")


def decode(
    process: InProcess, asks: list[Any], ignore_eos: bool = False
) -> list[list[int]]:
    canvases = [process.add(*ask, ignore_eos=ignore_eos) for ask in asks]
    while process.requests:
        process.run_round()
    return [canvas.ids.tolist() for canvas in canvases]


def decode_ahead(
    process: InProcess, graphs: WindowGraphs, asks: list[Any], num_steps: int
) -> list[list[int]]:
    """One more request every second round, with a forward in flight between rounds."""
    process.new_engine(num_steps, prelaunch=True, graphs=graphs)
    canvases = []
    for ask in asks:
        canvases.append(process.add(*ask, ignore_eos=True))
        process.run_round()
        process.run_round()
    while process.requests:
        process.run_round()
    return [canvas.ids.tolist() for canvas in canvases]


def noted_graphs(
    process: InProcess, capture: RecordedCapture
) -> tuple[WindowGraphs, list[str]]:
    """Turn new graphs on, and list the events from now on in their order.

    The events: the host waits, the inputs of a graph are put in place, a graph is
    replayed.
    """
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def note(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return note

    graphs = turn_on(process, lambda run: noted("replay", capture(run)))
    Denoiser.sync = noted("sync", Denoiser.sync)  # type: ignore[method-assign]
    graphs.stage = noted("stage", graphs.stage)  # type: ignore[method-assign]
    return graphs, events


def main() -> None:
    from sglang_dllm.demo import demo_path

    process = InProcess(str(demo_path()))
    cases = {"alone": REQUESTS[:1], "two": REQUESTS[:2], "three": REQUESTS}
    exact = (REQUESTS[0][0], 40, "LLaDA", {})
    cases["with one that has no cache"] = [*REQUESTS, exact]
    found = {}
    for name, asks in cases.items():
        process.new_engine()
        eager = decode(process, asks)
        capture = RecordedCapture()
        graphs = turn_on(process, capture)
        found[name] = {
            "eager": eager,
            "graphs": decode(process, asks),
            "buckets": [
                [*bucket, [statistic.kind for statistic in statistics]]
                for bucket, statistics in graphs.buckets.items()
            ],
            "num_captured": capture.num_captured,
            "num_replayed": capture.num_replayed,
        }
    capture = RecordedCapture()
    graphs = turn_on(process, capture)
    in_turn, captured = [], []
    for asks in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[:1], REQUESTS[1:2]):
        in_turn += decode(process, asks)
        captured.append(capture.num_captured)
    found["in turn"] = {
        "eager": 2 * found["two"]["eager"],
        "graphs": in_turn,
        "captured": captured,
    }
    process.new_engine()
    # A window of 32 tokens fills its bucket, and the next block starts behind it.
    asks = [*REQUESTS, (REQUESTS[0][0], 70, "FastDLLM", {"cache": "dual"})]
    eager = [ids for ask in asks for ids in decode(process, [ask], ignore_eos=True)]
    ahead = decode_ahead(process, turn_on(process, capture), asks, 2)
    graphs, events = noted_graphs(process, capture)
    for num_steps in (1, 2):
        for ask in asks:
            ahead += decode_ahead(process, graphs, [ask], num_steps)
    found["ahead"] = {"eager": 3 * eager, "graphs": ahead, "events": events}
    graphs = turn_on(process, fails)
    found["without memory"] = {
        "eager": found["three"]["eager"],
        "graphs": decode(process, REQUESTS),
        "buckets": list(graphs.buckets),
    }
    # SGLang prints to the same stream, so the reader takes the last line.
    print(json.dumps(found))


def turn_on(process: InProcess, capture: Capture) -> WindowGraphs:
    return turn_graphs_on(process, LIMITS, 128, capture)


if __name__ == "__main__":
    main()
