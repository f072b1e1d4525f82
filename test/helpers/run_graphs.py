"""Windows in graphs that are recorded on the CPU, on the demo model in this process.

Prints JSON: of each case, ids decoded eagerly and through graphs, and the buckets. A
process of its own: SGLang's parallel state is global.
"""

from __future__ import annotations

import json
from typing import Any

from helpers.in_process import InProcess
from helpers.recorded_capture import RecordedCapture, turn_graphs_on
from sglang_dllm.runtime.graphs import Capture, Limits, Run, WindowGraphs

REQUESTS = [
    (list(range(5, 30)), 60, "FullAttnMultiBlock", {"cache": "dual", "block_size": 16}),
    (list(range(9, 20)), 45, "FastDLLM", {"cache": "vicinity", "block_size": 8}),
    (list(range(7, 70)), 33, "Credit", {"cache": "prefix", "block_size": 16}),
]

LIMITS = Limits(batch_sizes=(1, 4), windows=(32, 64))


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
    process: InProcess, asks: list[Any], num_steps: int
) -> list[list[int]]:
    """One more request every second round, with forwards that run between rounds."""
    canvases = []
    for ask in asks:
        canvases.append(process.add(*ask, ignore_eos=True))
        process.run_round(num_steps, runs_ahead=True)
        process.run_round(num_steps, runs_ahead=True)
    while process.requests:
        process.run_round(num_steps, runs_ahead=True)
    return [canvas.ids.tolist() for canvas in canvases]


def events_of(process: InProcess, graphs: WindowGraphs, capture: Any) -> list[str]:
    """What happens in turn from now on: the host waits, a graph's inputs are put in
    place, it is replayed."""
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def note(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return note

    process.decoder.look = noted("look", process.decoder.look)  # type: ignore[method-assign]
    graphs.stage = noted("stage", graphs.stage)  # type: ignore[method-assign]
    graphs.capture = lambda run: noted("replay", capture(run))
    graphs._graphs.clear()
    return events


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
        capture = RecordedCapture()
        graphs = turn_on(process, capture)
        found[name] = {
            "eager": eager,
            "graphs": decode(process, asks),
            "buckets": [
                [*bucket, [statistic.kind for statistic in graph.statistics]]
                for bucket, graph in graphs._graphs.items()
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
    process.rounds.graphs = None
    # A block of 32 fills its bucket, and the next one lies behind it.
    asks = [*REQUESTS, (REQUESTS[0][0], 70, "FastDLLM", {"cache": "dual"})]
    eager = [ids for ask in asks for ids in decode(process, [ask], ignore_eos=True)]
    graphs = turn_on(process, capture)
    ahead = decode_ahead(process, asks, 2)
    events = events_of(process, graphs, capture)
    for num_steps in (1, 2):
        ahead += [i for ask in asks for i in decode_ahead(process, [ask], num_steps)]
    found["ahead"] = {"eager": 3 * eager, "graphs": ahead, "events": events}
    graphs = turn_on(process, fails)
    found["without memory"] = {
        "eager": found["three"]["eager"],
        "graphs": decode(process, REQUESTS),
        "buckets": list(graphs._graphs),
    }
    # The last line; SGLang prints what it likes before it.
    print(json.dumps(found))


def turn_on(process: InProcess, capture: Capture) -> WindowGraphs:
    return turn_graphs_on(process, LIMITS, 128, capture)


if __name__ == "__main__":
    main()
