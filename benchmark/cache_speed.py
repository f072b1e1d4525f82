"""What each cache gains and costs: the same problems by every strategy, one server.

    python benchmark/cache_speed.py [--num 200] [--concurrency 4] [--algorithm NAME] \
        [--option KEY=VALUE] [--canvas-len 512] [--json OUT]

Held-out problems of the demo model, in canvases of one length. They are dealt out to
the rounds; in each round every strategy answers the round's problems in turn, so that
whatever slows down the machine slows down all. Printed for each strategy: accuracy
over all problems, visible tokens per forward, forwards and full refreshes per problem,
rows computed and reused per forward, seconds per problem, and the speed as a multiple
of that without a cache in the same round, median over the rounds.

The differences of accuracy to no cache are paired: `lost` and `won` count the problems
that one of the two alone got right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from local_server import (
    BenchmarkError,
    Reply,
    ask_all,
    chat_prompts,
    local_server,
    median_ratio,
    run_command,
    server_ask,
)

from gsm8k import OneLineParser, at_least, parse_option

STRATEGIES = ("none", "prefix", "dual", "delayed", "vicinity")
OPTIONS: dict[str, dict[str, Any]] = {"EntropyThreshold": {"threshold": 0.0}}
"""Where none are given: as many forwards as tokens, almost."""


@dataclass
class Pass:
    """One strategy's answers: seconds of each round, and sums over all problems."""

    seconds: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0

    def add(self, replies: Sequence[Reply], right: Sequence[bool], s: float) -> None:
        self.seconds.append(s / len(replies))
        self.right += right
        for reply in replies:
            self.tokens += len(reply.ids)
            self.forwards += reply.forwards
            for name in ("tokens_computed", "tokens_cached", "full_refreshes"):
                setattr(self, name, getattr(self, name) + reply.meta[name])


def figures_of(ours: Pass, base: Pass) -> dict[str, Any]:
    """What the table says of one strategy, beside the one without a cache."""
    num = len(ours.right)
    pairs = list(zip(base.right, ours.right, strict=True))
    return {
        **asdict(ours),
        "accuracy": sum(ours.right) / num,
        "accuracy_change": (sum(ours.right) - sum(base.right)) / num,
        "lost": sum(before and not now for before, now in pairs),
        "won": sum(now and not before for before, now in pairs),
        "tokens_per_forward": ours.tokens / ours.forwards,
        "seconds_per_problem": median(ours.seconds),
        "speed": median_ratio(base.seconds, ours.seconds),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add, count = parser.add_argument, at_least(1, int)
    add("--model-path", help="checkpoint folder; default: the demo model")
    add("--algorithm", default="EntropyThreshold")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    add("--canvas-len", type=at_least(128, int), default=512)
    add("--num", type=count, default=10, help="problems, dealt out to the rounds")
    add("--seed", type=int, default=7, help="of the problems")
    add("--concurrency", type=count, default=4)
    add("--rounds", type=at_least(5, int), default=5)
    add("--json", type=Path)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from sglang_dllm.demo import demo_path
    from sglang_dllm.demo.evaluate import final_value, heldout

    if args.num < args.rounds:
        raise BenchmarkError(f"--num {args.num}: every round needs a problem")
    model_path = args.model_path or str(demo_path())
    problems = heldout(args.num, seed=args.seed)
    prompts = chat_prompts(model_path, [problem.question for problem in problems])
    dllm = {"algorithm": args.algorithm, "block_size": 32}
    dllm |= dict(args.option) or OPTIONS.get(args.algorithm, {})
    strategies = list(dict.fromkeys(["none", *args.strategies]))
    passes = {name: Pass() for name in strategies}
    with local_server(model_path, args.algorithm) as server:
        asks = {
            name: server_ask(
                server.base_url, dllm | {"cache": name}, canvas_len=args.canvas_len
            )
            for name in strategies
        }
        for ask in asks.values():
            ask(prompts[0])
        for index in range(args.rounds):
            # Round by round another one begins.
            turn = index % len(strategies)
            for name in strategies[turn:] + strategies[:turn]:
                chosen = range(index, args.num, args.rounds)
                replies, seconds = ask_all(
                    asks[name], [prompts[i] for i in chosen], args.concurrency
                )
                right = [
                    final_value(reply.text) == problems[i].value
                    for i, reply in zip(chosen, replies, strict=True)
                ]
                passes[name].add(replies, right, seconds)
    base = passes["none"]
    return {
        **dllm,
        "canvas_len": args.canvas_len,
        "problems": args.num,
        "rounds": args.rounds,
        "concurrency": args.concurrency,
        "caches": {name: figures_of(one, base) for name, one in passes.items()},
    }


def show(figures: dict[str, Any]) -> str:
    num = figures["problems"]
    lines = [
        f"{'cache':<10}{'accuracy':>9}{'lost':>6}{'won':>5}{'TPF':>6}{'forwards':>10}"
        f"{'full':>6}{'computed':>10}{'reused':>8}{'s/problem':>11}{'speed':>7}"
    ]
    for name, row in figures["caches"].items():
        forwards = row["forwards"]
        lines.append(
            f"{name:<10}{100 * row['accuracy']:>8.1f}%{row['lost']:>6}{row['won']:>5}"
            f"{row['tokens_per_forward']:>6.2f}{forwards / num:>10.1f}"
            f"{row['full_refreshes'] / num:>6.1f}"
            f"{row['tokens_computed'] / forwards:>10.0f}"
            f"{row['tokens_cached'] / forwards:>8.0f}"
            f"{row['seconds_per_problem']:>11.3f}{row['speed']:>7.2f}"
        )
    lines.append(
        f"{num} problems in canvases of {figures['canvas_len']}, "
        f"{figures['concurrency']} at once, {figures['algorithm']}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("cache_speed.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
