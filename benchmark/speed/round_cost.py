"""The cost of a denoising step beside the model: the parts of a round, in one process.

    python -m benchmark.speed.round_cost [--canvases 1 4 16] [--steps-per-round 1 4] \
        [--algorithm NAME] [--option KEY=VALUE] [--model-path DIR] [--json OUT]

The server's engine decodes held-out problems of the demo model without scheduler, HTTP
and detokenizer. The table has milliseconds per forward, the median over the rounds of a
pass and then over the passes:

- `model`: embedding up to the final norm; `head`: the logits of the candidates;
- `measure`: the best tokens and their statistics; `commit`: the rest of the denoiser's
  work on a forward, with the next step;
- `pack`: packing the next forward; `batch`: SGLang's forward batch with our plan;
- `runner`: SGLang's ModelRunner around the model; `rest`: the round's part of the
  scheduler and everything else;
- `outside`: the share that is neither model nor head; `-measure`: the same without
  `measure`.

server_bound.py measures the whole scheduler process at 16 canvases.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmark.command import Figures, at_least, options_of, run_command, speed_parser
from benchmark.server import heldout_prompts
from benchmark.subprocess_worker import in_subprocess

PARTS = ("model", "head", "measure", "commit", "pack", "batch", "runner", "rest")


class Clock:
    """Seconds of each part. A part inside another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part = "rest"
        self.since = time.perf_counter()

    def turn(self, part: str) -> str:
        """Begin a part. Returns the part that ends."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before

    def over(self, owner: Any, name: str, part: str) -> None:
        """From now on, count calls of ``owner.name`` for a part."""
        function = getattr(owner, name)

        def timed(*args: Any, **others: Any) -> Any:
            before = self.turn(part)
            try:
                return function(*args, **others)
            finally:
                self.turn(before)

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far. Counting begins anew."""
        self.turn("rest")
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


def typical(rounds: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Milliseconds per forward of each part, medians over the rounds.

    Args:
        rounds: the seconds of each part, and the number of forwards.
    """
    return {
        part: median(1e3 * seconds[part] / forwards for seconds, forwards in rounds)
        for part in PARTS
    }


def shares(ms: dict[str, float]) -> dict[str, float]:
    """The share of the time outside model and head, with and without ``measure``."""
    total = sum(ms.values())
    inside = ms["model"] + ms["head"]
    return {
        "outside_share": 1 - inside / total,
        "outside_and_measure_share": 1 - (inside + ms["measure"]) / total,
    }


class Timed:
    """The engine and the clock around its parts. It lives in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        from benchmark.in_process import InProcess
        from sglang_dllm.decoding import logits

        self.args = args
        most = max(args.canvases)
        self.prompts = heldout_prompts(args.model_path, most)
        tokens = sum(map(len, self.prompts)) + most * args.max_new_tokens
        self.model = model = InProcess(
            args.model_path,
            *("--max-total-tokens", str(tokens + 64)),
            *("--max-running-requests", str(most + 1)),
        )
        self.clock = clock = Clock()
        clock.over(model.runner, "forward", "runner")
        clock.over(model.runner.model, "forward", "model")
        clock.over(model.runner.model, "logits", "head")
        clock.over(logits, "measure", "measure")

    def table(self) -> list[dict[str, Any]]:
        """Every number of canvases with every number of steps, in turns."""
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
        """Decode the first prompts until one of them is done."""
        model, args, clock = self.model, self.args, self.clock
        options = options_of(args)
        model.new_engine(steps)
        clock.over(model.model, "launch", "batch")
        clock.over(model.denoiser, "pack", "pack")
        clock.over(model.denoiser, "commit", "commit")
        clock.over(model.denoiser, "sync", "commit")
        rounds = []
        canvases = [
            model.add(prompt, args.max_new_tokens, args.algorithm, options)
            for prompt in self.prompts[:num]
        ]
        clock.take()
        while len(model.requests) == num:
            before = canvases[0].num_forwards
            model.run_round()
            rounds.append((clock.take(), canvases[0].num_forwards - before))
        model.remove(canvases)
        # The last round removes canvases and may be short, so it does not count.
        return typical(rounds[:-1] or rounds)


def build_parser() -> argparse.ArgumentParser:
    parser = speed_parser(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--canvases", type=count, nargs="+", default=[1, 4, 16])
    add("--steps-per-round", type=count, nargs="+", default=[1, 4])
    add("--max-new-tokens", type=count, default=64)
    return parser


def measure(args: argparse.Namespace) -> Figures:
    with in_subprocess("benchmark.speed.round_cost:Timed", args) as call:
        kinds = call("table")
    return {
        "algorithm": args.algorithm,
        "options": options_of(args),
        "rounds": args.rounds,
        "kinds": kinds,
    }


def show(figures: Figures) -> str:
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


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
