"""Decodes in recorded steps on a model in this process.

Prints JSON: for each case what was decoded eagerly and in captured steps, and counts.
It needs a process of its own, since SGLang's parallel state is global.

Arguments: the model's folder, the cases as JSON (algorithm, options, prelaunch), and
launch flags.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmark.in_process import InProcess
from benchmark.speed.launch_gap import Operations
from helpers.recorded_capture import RecordedCapture, grid_of, make_graphs
from helpers.static_steps import news
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.runtime.graphs import CanvasGraphs

CANVAS_LEN = 128

SIZES = [(25, 60), (11, 45), (40, 33), (7, 64), (19, 20)]
"""Tokens of each prompt and of its answer."""


def make_steps(
    process: InProcess, algorithm: str, options: dict[str, Any], lengths: list[int]
) -> CanvasGraphs:
    """Captured steps of up to 4 canvases. The runner's attention is replaced."""
    default = process.dllm_config.decode
    decoding = default.resolve({"algorithm": algorithm, **options})
    return make_graphs(
        process.runner,
        process.facts,
        grid_of((1, 4), lengths),
        CANVAS_LEN,
        RecordedCapture(),
        decoding,
    )


def decode(process: InProcess, algorithm: str, options: dict[str, Any]) -> list[Any]:
    """One more request every second round; the news of every canvas at its end."""
    canvases: list[Canvas] = []
    for number, (num_prompt, answer_len) in enumerate(SIZES):
        prompt = range(5 + number, 5 + number + num_prompt)
        more = {"max_forwards": 6} if number == 3 else {}
        canvases.append(
            process.add(
                list(prompt),
                answer_len,
                algorithm,
                options | more,
                ignore_eos=number % 2 == 1,
            )
        )
        process.run_round()
        process.run_round()
        # The pool's last canvas waits until there is room in the captured batch.
        while len(process.requests) > 3:
            process.run_round()
    while process.requests:
        process.run_round()
    return [news(canvas) for canvas in canvases]


class Watch:
    """Counts captured and eager steps, and what computes between two replays."""

    def __init__(self, process: InProcess) -> None:
        self.num_captured = self.num_eager = 0
        self.between: list[list[str]] = []
        self.operations = Operations()
        self._last: Any = None
        model = process.model
        launch, launch_step = model.launch, model.launch_step
        assert model.graphs is not None and model.graphs.steps is not None

        def eager(*args: Any) -> Any:
            self.num_eager += 1
            self._last = None
            return launch(*args)

        def captured(group: Any) -> bool:
            since = list(self.operations.names)
            if not launch_step(group):
                return False
            if self._last is group:
                self.between.append(since)
            self._last = group
            self.num_captured += 1
            self.operations.names.clear()
            return True

        model.launch, model.launch_step = eager, captured  # type: ignore[method-assign]


def main() -> None:
    process, found = InProcess(sys.argv[1], *sys.argv[3:]), []
    for algorithm, options, prelaunch in json.loads(sys.argv[2]):
        process.new_engine(2, prelaunch)
        eager = decode(process, algorithm, options)
        lengths = [128] if options["cache"] == "none" else [32, 64]
        attention = process.runner.attn_backend.canvas_attention
        graphs = make_steps(process, algorithm, options, lengths)
        process.new_engine(2, prelaunch, graphs=graphs)
        watch = Watch(process)
        with watch.operations:
            captured = decode(process, algorithm, options)
        process.runner.attn_backend.canvas_attention = attention
        found.append(
            {
                "eager": eager,
                "captured": captured,
                "num_captured": watch.num_captured,
                "num_eager": watch.num_eager,
                "between": watch.between,
            }
        )
    # SGLang prints to the same stream, so the reader takes the last line.
    print(json.dumps(found))


if __name__ == "__main__":
    main()
