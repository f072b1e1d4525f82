"""The server against the plain loop: same checkpoint, same prompts, same rule.

    python -m benchmark.speed.compare_plain_loop [--threshold NATS] \
        [--model-path DIR] [--json OUT]

The plain loop (plain_loop.py) and the server answer the same problems in turns, the
server at each concurrency. The tokens must be the same. The table has tokens per second
and latency as ratios to the loop's, medians over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmark.command import Figures, at_least, parser_of, run_command
from benchmark.gsm8k.problems import read_problems
from benchmark.server import (
    Ask,
    Reply,
    ask_all,
    chat_prompts,
    heldout_prompts,
    local_server,
    server_ask,
)

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Pass:
    """All prompts answered once, by the loop or by the server."""

    tokens_per_second: float
    latency: float
    forwards: int
    ids: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """The passes of one side. The ratios are to the loop's pass of the same round.

    Attributes:
        equal: prompts whose tokens are the loop's, in the worst round.
    """

    tokens_per_second: float
    latency: float
    forwards: int
    throughput_ratio: float
    latency_ratio: float
    equal: int


def one_pass(ask: Ask, prompts: Sequence[list[int]], concurrency: int) -> Pass:
    replies, seconds = ask_all(ask, prompts, concurrency)
    return Pass(
        sum(len(reply.ids) for reply in replies) / seconds,
        median(reply.seconds for reply in replies),
        sum(reply.forwards for reply in replies),
        [reply.ids for reply in replies],
    )


def compare(loop: Sequence[Pass], ours: Sequence[Pass]) -> Comparison:
    """Medians over the rounds, and medians of the ratios of each round."""
    pairs = list(zip(loop, ours, strict=True))

    def ratio(of: Callable[[Pass], float]) -> float:
        return median(of(mine) / of(base) for base, mine in pairs)

    return Comparison(
        tokens_per_second=median(p.tokens_per_second for p in ours),
        latency=median(p.latency for p in ours),
        forwards=ours[0].forwards,
        throughput_ratio=ratio(lambda p: p.tokens_per_second),
        latency_ratio=ratio(lambda p: p.latency),
        equal=min(
            sum(a == b for a, b in zip(base.ids, mine.ids, strict=True))
            for base, mine in pairs
        ),
    )


def loop_ask(model_path: str, answer_len: int, threshold: float) -> Ask:
    """A function that answers by the plain loop."""
    from benchmark.speed.plain_loop import decode, load

    model = load(model_path)

    def ask(prompt: list[int]) -> Reply:
        began = perf_counter()
        ids, forwards = decode(model, prompt, answer_len, threshold, BLOCK_SIZE)
        return Reply(ids, forwards, perf_counter() - began)

    return ask


def build_parser() -> argparse.ArgumentParser:
    from sglang_dllm.demo import demo_path

    parser = parser_of(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--model-path", default=str(demo_path()), help="checkpoint; default: demo")
    add("--threshold", type=at_least(0, float), default=0.5, help="nats of entropy")
    add("--data", type=Path, help="JSONL of question; default: held-out demo problems")
    add("--num", type=count, default=16, help="problems a round")
    add("--max-new-tokens", type=count, default=64)
    add("--concurrency", type=count, nargs="+", default=[1, 16])
    add("--rounds", type=at_least(5, int), default=5, help="repetitions, 5 or more")
    return parser


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    if args.data is None:
        return heldout_prompts(args.model_path, args.num)
    problems = read_problems(args.data, args.num)
    return chat_prompts(args.model_path, [problem.question for problem in problems])


def measure(args: argparse.Namespace) -> Figures:
    prompts = prompts_of(args)
    loop = loop_ask(args.model_path, args.max_new_tokens, args.threshold)
    dllm = {"algorithm": "EntropyThreshold", "threshold": args.threshold}
    dllm |= {"block_size": BLOCK_SIZE, "early_stop": False}
    base: list[Pass] = []
    passes: dict[int, list[Pass]] = {n: [] for n in args.concurrency}
    with local_server(args.model_path, "EntropyThreshold") as server:
        ours = server_ask(server.base_url, dllm, args.max_new_tokens)
        for ask in (loop, ours):
            ask(prompts[0])  # the first answer is slower than the others
        for _ in range(args.rounds):
            base.append(one_pass(loop, prompts, 1))
            for concurrency, done in passes.items():
                done.append(one_pass(ours, prompts, concurrency))
    return {
        **dllm,
        "max_new_tokens": args.max_new_tokens,
        "problems": len(prompts),
        "rounds": args.rounds,
        "plain loop": asdict(compare(base, base)),
        "server": {n: asdict(compare(base, done)) for n, done in passes.items()},
    }


def show(figures: Figures) -> str:
    columns: dict[str, Any] = {"plain loop": figures["plain loop"]}
    columns |= {f"server, {n} at once": row for n, row in figures["server"].items()}
    head = f"{'':<22}{'tok/s':>9}{'ratio':>7}{'latency':>9}{'ratio':>7}"
    lines = [f"{head}{'forwards':>10}{'equal':>9}"]
    for name, row in columns.items():
        lines.append(
            f"{name:<22}{row['tokens_per_second']:>9.1f}{row['throughput_ratio']:>7.2f}"
            f"{row['latency']:>9.3f}{row['latency_ratio']:>7.2f}{row['forwards']:>10}"
            f"{row['equal']:>6}/{figures['problems']}"
        )
    return "\n".join(lines)


def problem(figures: Figures) -> str | None:
    wrong = any(r["equal"] < figures["problems"] for r in figures["server"].values())
    return "tokens differ from the plain loop's" if wrong else None


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show, problem))
