"""What a denoising step costs beside the model: the parts of a round, in one process.

    python benchmark/round_cost.py [--canvases 1 4 16] [--steps-per-round 1 4] \
        [--algorithm NAME] [--option KEY=VALUE] [--model-path DIR] [--json OUT]

Held-out problems of the demo model are decoded by the object the server runs its rounds
with, without scheduler, HTTP and detokenizer. Printed, milliseconds per forward, each
the median over the rounds of a pass, then over the passes:

- `model`: embedding up to the final norm; `head`: the logits of the candidates;
- `measure`: the best tokens and how sure they are; `commit`: what else the decoder
  does with a forward's result, and planning the next one;
- `layout`: packing the next forward; `batch`: the round's batch and SGLang's form of
  it; `runner`: what SGLang's ModelRunner does around the model; `rest`: all else;
- the share of all that is neither model nor head, and neither of these nor measure.

The whole scheduler process, at 16 canvases: server_bound.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from local_server import chat_prompts, heldout_questions, run_command
from subprocess_worker import in_subprocess

from gsm8k import OneLineParser, at_least, parse_option

PARTS = ("model", "head", "measure", "commit", "layout", "batch", "runner", "rest")
OPTIONS: dict[str, dict[str, Any]] = {"EntropyThreshold": {"threshold": 0.0}}


class Clock:
    """Seconds of each part; a part inside another one is not the other's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part = "rest"
        self.since = time.perf_counter()

    def turn(self, part: str) -> str:
        """What runs from now on; returns what ran."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before

    def over(self, owner: Any, name: str, part: str) -> None:
        """Calls of a function belong to a part from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **others: Any) -> Any:
            before = self.turn(part)
            try:
                return function(*args, **others)
            finally:
                self.turn(before)

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far, which begin anew."""
        self.turn("rest")
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


def typical(rounds: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Milliseconds per forward of each part, medians over the rounds.

    Args:
        rounds: seconds of each part, and the forwards that they were spent on.
    """
    return {
        part: median(1e3 * seconds[part] / forwards for seconds, forwards in rounds)
        for part in PARTS
    }


def shares(ms: dict[str, float]) -> dict[str, float]:
    """Of all milliseconds, those outside model and head, and those outside measure."""
    total = sum(ms.values())
    inside = ms["model"] + ms["head"]
    return {
        "outside_share": 1 - inside / total,
        "outside_and_measure_share": 1 - (inside + ms["measure"]) / total,
    }


class Timed:
    """The rounds of some prompts, part by part."""

    def __init__(self, args: argparse.Namespace, model_path: str) -> None:
        from helpers.in_process import InProcess
        from sglang_dllm.decoding import logits

        self.args = args
        most = max(args.canvases)
        questions = heldout_questions(most)
        self.prompts = chat_prompts(model_path, questions)
        rows = sum(map(len, self.prompts)) + most * args.max_new_tokens
        self.model = model = InProcess(
            model_path,
            *("--max-total-tokens", str(rows + 64)),
            *("--max-running-requests", str(most + 1)),
        )
        self.clock = clock = Clock()
        clock.over(model, "begin_round", "batch")
        clock.over(model.runner, "forward", "runner")
        clock.over(model.runner.model, "forward", "model")
        clock.over(model.runner.model, "logits", "head")
        clock.over(model.decoder, "layout", "layout")
        clock.over(model.decoder, "commit", "commit")
        clock.over(model.decoder, "look", "commit")
        clock.over(logits, "measure", "measure")

    def table(self) -> list[dict[str, Any]]:
        """Each number of canvases with each number of steps, in turn."""
        args = self.args
        kinds = [(num, n) for num in args.canvases for n in args.steps_per_round]
        passes: dict[Any, list[dict[str, float]]] = {kind: [] for kind in kinds}
        self.one_pass(*kinds[0])
        for _ in range(args.rounds):
            for kind, found in passes.items():
                found.append(self.one_pass(*kind))
        rows = []
        for (num, steps), found in passes.items():
            ms = {part: median(one[part] for one in found) for part in PARTS}
            rows.append({"canvases": num, "steps": steps, "ms": ms, **shares(ms)})
        return rows

    def one_pass(self, num: int, steps: int) -> dict[str, float]:
        """The first prompts decoded while all of them are active."""
        model, args = self.model, self.args
        options = options_of(args)
        rounds = []
        for prompt in self.prompts[:num]:
            model.add(prompt, args.max_new_tokens, args.algorithm, options)
        first = model.decoder.canvases[0]
        self.clock.take()
        while len(model.requests) == num:
            before = first.num_forwards
            model.run_round(steps)
            rounds.append((self.clock.take(), first.num_forwards - before))
        model.remove(model.decoder.canvases)
        # The last round also takes canvases out, and may be a short one.
        return typical(rounds[:-1] or rounds)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(args.option) or OPTIONS.get(args.algorithm, {})


def in_process_parser(doc: str, algorithm: str) -> argparse.ArgumentParser:
    """Arguments of a benchmark of rounds in one process, by its docstring."""
    parser = OneLineParser(description=doc.splitlines()[0])
    add, count = parser.add_argument, at_least(1, int)
    add("--model-path", help="checkpoint folder; default: the demo model")
    add("--algorithm", default=algorithm)
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--canvases", type=count, nargs="+", default=[1, 4, 16])
    add("--max-new-tokens", type=count, default=64)
    add("--rounds", type=at_least(5, int), default=5, help="passes of each kind")
    add("--json", type=Path)
    return parser


def measure_apart(
    make: str, args: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    """The table of what ``make`` names, in a process of its own, and what it is of."""
    from sglang_dllm.demo import demo_path

    model_path = args.model_path or str(demo_path())
    with in_subprocess(make, args, model_path) as call:
        table = call("table")
    return {
        "algorithm": args.algorithm,
        "options": options,
        "rounds": args.rounds,
        "kinds": table,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = in_process_parser(__doc__ or "", "EntropyThreshold")
    steps = at_least(1, int)
    parser.add_argument("--steps-per-round", type=steps, nargs="+", default=[1, 4])
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return measure_apart("round_cost:Timed", args, options_of(args))


def show(figures: dict[str, Any]) -> str:
    head = "".join(f"{part:>9}" for part in PARTS)
    lines = [f"{'canvases':>8}{'steps':>6}{head}{'outside':>9}{'-measure':>10}"]
    for row in figures["kinds"]:
        parts = "".join(f"{row['ms'][part]:>9.3f}" for part in PARTS)
        lines.append(
            f"{row['canvases']:>8}{row['steps']:>6}{parts}"
            f"{100 * row['outside_share']:>8.1f}%"
            f"{100 * row['outside_and_measure_share']:>9.1f}%"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("round_cost.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
