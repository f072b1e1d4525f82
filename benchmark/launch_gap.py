"""What the host does between hearing of a step and launching the next one's graph.

    python benchmark/launch_gap.py [--canvases 1 4 16] [--algorithm NAME] \
        [--option KEY=VALUE] [--model-path DIR] [--json OUT]

A device has nothing to do then. What a graph reads is put in place before the host
waits for the step (`WindowGraphs.stage`). Printed for steps whose windows stay, with
that and without, in turns: microseconds from the transfer's arrival to the launch, the
median over steps and then over passes, and tensor operations called in between.

On a CPU a recording stands for a graph; an operation costs about as much host time as
the launch of a kernel, so the host's part is what it is. The device's is not seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from local_server import chat_prompts, heldout_questions, run_command
from round_cost import in_process_parser, measure_apart
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS: dict[str, dict[str, Any]] = {"LLaDA": {"cache": "dual", "block_size": 32}}
"""One token a step, so that most windows stay."""

CANVAS_LEN = 512


class Count(TorchDispatchMode):
    """How many tensor operations have been called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Gaps:
    """Runs in a process of its own: a model, and graphs that are recorded."""

    def __init__(self, args: argparse.Namespace, model_path: str) -> None:
        from helpers.in_process import InProcess
        from helpers.recorded_capture import RecordedCapture, turn_graphs_on
        from sglang_dllm.decoding import decoder
        from sglang_dllm.runtime.graphs import Limits

        self.args = args
        most = max(args.canvases)
        self.prompts = chat_prompts(model_path, heldout_questions(most))
        self.model = InProcess(
            model_path,
            *("--max-total-tokens", str(most * CANVAS_LEN)),
            *("--max-running-requests", str(most + 1)),
        )
        capture = RecordedCapture()

        def noted(run: Any) -> Any:
            replay = capture(run)

            def launch() -> Any:
                self.launched()
                return replay()

            return launch

        turn_graphs_on(self.model, Limits(), CANVAS_LEN, noted)
        look, update = self.model.decoder.look, decoder._update

        def looked() -> None:
            self.since = None
            look()

        def heard(*args: Any) -> None:
            if self.since is None:
                self.since = self.now()
            update(*args)

        self.model.decoder.look = looked  # type: ignore[method-assign]
        decoder._update = heard
        self.count: Count | None = None
        self.since: float | None = None
        self.windows: list[tuple[int, int]] = []
        self.found: list[float] = []

    def now(self) -> float:
        """Calls where they are counted, else seconds."""
        return time.perf_counter() if self.count is None else self.count.calls

    def launched(self) -> None:
        """A graph is about to be replayed. Where windows stay, note since when."""
        now, windows = self.now(), [c.window for c in self.model.decoder.canvases]
        if self.since is not None and windows == self.windows:
            self.found.append(now - self.since)
        self.windows = windows

    def table(self) -> list[dict[str, Any]]:
        """Each number of canvases, staged and not."""
        args, rows = self.args, []
        for num in args.canvases:
            self.one_pass(num, staged=True)  # captures
            passes: dict[str, list[float]] = {"staged": [], "not": []}
            for _ in range(args.rounds):
                for way, found in passes.items():
                    found.append(median(self.one_pass(num, way == "staged")))
            calls = {}
            for way in passes:
                with Count() as self.count:
                    calls[way] = median(self.one_pass(num, way == "staged"))
                self.count = None
            us = {way: 1e6 * median(found) for way, found in passes.items()}
            rows.append({"canvases": num, "us": us, "calls": calls})
        return rows

    def one_pass(self, num: int, staged: bool) -> list[float]:
        """The first prompts until one is done: of each step with a graph."""
        model, args, rounds = self.model, self.args, self.model.rounds
        options = options_of(args)
        for prompt in self.prompts[:num]:
            model.add(prompt, args.max_new_tokens, args.algorithm, options)
        stage = type(rounds)._stage
        rounds._stage = (lambda: stage(rounds)) if staged else (lambda: None)  # type: ignore[method-assign]
        self.found = []
        while len(model.requests) == num:
            model.run_round(4, runs_ahead=True)
        rounds.land()
        model.remove(model.decoder.canvases)
        return self.found


def build_parser() -> argparse.ArgumentParser:
    return in_process_parser(__doc__ or "", "LLaDA")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return measure_apart("launch_gap:Gaps", args, options_of(args))


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(args.option) or OPTIONS.get(args.algorithm, {})


def show(figures: dict[str, Any]) -> str:
    lines = [
        f"{'canvases':>8}{'us staged':>11}{'not':>7}{'ratio':>7}{'calls':>7}{'not':>5}"
    ]
    for row in figures["kinds"]:
        us, calls = row["us"], row["calls"]
        times = (
            f"{us['staged']:>11.0f}{us['not']:>7.0f}{us['not'] / us['staged']:>7.1f}"
        )
        lines.append(
            f"{row['canvases']:>8}{times}{calls['staged']:>7.0f}{calls['not']:>5.0f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("launch_gap.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
