"""Speed and accuracy of every cache: the same problems by each, on one server.

    python -m benchmark.speed.cache_speed [--num 200] [--concurrency 4] \
        [--algorithm NAME] [--option KEY=VALUE] [--canvas-len 512] [--json OUT]

The problems are held-out ones of the demo model, in canvases of one length. Each round
has a part of them, and every cache answers that part in turn, so that a slow moment of
the machine slows all caches. The table has for each cache: accuracy over all problems,
visible tokens per forward, forwards and full refreshes per problem, tokens computed and
cached per forward, seconds per problem, and the speed as a multiple of the speed
without a cache in the same round, median over the rounds.

`lost` counts the problems that only "no cache" answers right, `won` the problems that
only this cache answers right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmark.command import (
    BenchmarkError,
    Figures,
    at_least,
    options_of,
    run_command,
    speed_parser,
)
from benchmark.gsm8k.problems import last_number
from benchmark.server import (
    Reply,
    ask_all,
    chat_prompts,
    local_server,
    median_ratio,
    server_ask,
)

CACHES = ("none", "prefix", "dual", "delayed", "vicinity")


@dataclass
class Pass:
    """The answers of one cache: seconds of each round, sums over all problems."""

    seconds: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0

    def add(self, replies: Sequence[Reply], right: Sequence[bool], s: float) -> None:
        """Count one round of ``s`` seconds."""
        self.seconds.append(s / len(replies))
        self.right += right
        for reply in replies:
            self.tokens += len(reply.ids)
            self.forwards += reply.forwards
            self.tokens_computed += reply.meta["tokens_computed"]
            self.tokens_cached += reply.meta["tokens_cached"]
            self.full_refreshes += reply.meta["full_refreshes"]


def figures_of(ours: Pass, base: Pass) -> Figures:
    """The figures of one cache beside those without a cache."""
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
    parser = speed_parser(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--caches", nargs="+", default=CACHES, choices=CACHES)
    add("--canvas-len", type=at_least(128, int), default=512)
    add("--num", type=count, default=10, help="problems, shared out to the rounds")
    add("--seed", type=int, default=7, help="of the problems")
    add("--concurrency", type=count, default=4)
    return parser


def measure(args: argparse.Namespace) -> Figures:
    from sglang_dllm.demo.problems import heldout

    if args.num < args.rounds:
        raise BenchmarkError(f"--num {args.num}: every round needs a problem")
    problems = heldout(args.num, seed=args.seed)
    prompts = chat_prompts(args.model_path, [problem.question for problem in problems])
    dllm = {"algorithm": args.algorithm, "block_size": 32, **options_of(args)}
    caches = list(dict.fromkeys(["none", *args.caches]))
    passes = {name: Pass() for name in caches}
    with local_server(args.model_path, args.algorithm) as server:
        asks = {
            name: server_ask(
                server.base_url, dllm | {"cache": name}, canvas_len=args.canvas_len
            )
            for name in caches
        }
        for ask in asks.values():
            ask(prompts[0])  # the first answer is slower than the others
        for index in range(args.rounds):
            turn = index % len(caches)  # each round begins with another cache
            for name in caches[turn:] + caches[:turn]:
                chosen = range(index, args.num, args.rounds)
                replies, seconds = ask_all(
                    asks[name], [prompts[i] for i in chosen], args.concurrency
                )
                right = [
                    last_number(reply.text) == str(problems[i].value)
                    for i, reply in zip(chosen, replies, strict=True)
                ]
                passes[name].add(replies, right, seconds)
    return {
        **dllm,
        "canvas_len": args.canvas_len,
        "problems": args.num,
        "rounds": args.rounds,
        "concurrency": args.concurrency,
        "caches": {
            name: figures_of(one, passes["none"]) for name, one in passes.items()
        },
    }


def show(figures: Figures) -> str:
    num = figures["problems"]
    lines = [
        f"{'cache':<10}{'accuracy':>9}{'lost':>6}{'won':>5}{'TPF':>6}{'forwards':>10}"
        f"{'full':>6}{'computed':>10}{'cached':>8}{'s/problem':>11}{'speed':>7}"
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


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
