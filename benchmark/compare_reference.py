"""Our server against the plain reference loop: same checkpoint, prompts, algorithm.

    python benchmark/compare_reference.py [--algorithm NAME] [--option KEY=VALUE] \
        [--model-path DIR] [--json OUT]

The reference (test/reference/: transformers' modules, batch 1, one forward at a time)
and the server answer the same problems in turn, round after round in one run, the
server at each concurrency. Tokens are compared first; then tokens per second and
latency are printed as ratios to the reference's, medians over the rounds.

The reference decodes its whole canvas; the server ends once the visible answer is
committed. Forwards of both are printed, and the ratio per forward beside the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from local_server import (
    Ask,
    Reply,
    ask_all,
    chat_prompts,
    heldout_questions,
    local_server,
    run_command,
    server_ask,
)

from gsm8k import OneLineParser, at_least, parse_option
from gsm8k_problems import BenchmarkError, read_problems


@dataclass(frozen=True)
class Pass:
    """All prompts answered once: by the reference, or by the server."""

    tokens_per_second: float
    latency: float
    forwards: int
    ids: list[list[int]]


@dataclass(frozen=True)
class Figures:
    """Of one way of asking; the ratios are to the reference of the same round."""

    tokens_per_second: float
    latency: float
    forwards: int
    throughput_ratio: float
    latency_ratio: float
    forwards_per_second_ratio: float
    # Prompts whose tokens are the reference's.
    equal: int


def one_pass(ask: Ask, prompts: Sequence[list[int]], concurrency: int) -> Pass:
    replies, seconds = ask_all(ask, prompts, concurrency)
    return Pass(
        sum(len(reply.ids) for reply in replies) / seconds,
        median(reply.seconds for reply in replies),
        sum(reply.forwards for reply in replies),
        [reply.ids for reply in replies],
    )


def compare(reference: Sequence[Pass], ours: Sequence[Pass]) -> Figures:
    """Medians over the rounds, of figures and of each round's ratio."""
    pairs = list(zip(reference, ours, strict=True))

    def ratio(of: Callable[[Pass], float]) -> float:
        return median(of(mine) / of(base) for base, mine in pairs)

    return Figures(
        tokens_per_second=median(p.tokens_per_second for p in ours),
        latency=median(p.latency for p in ours),
        forwards=ours[0].forwards,
        throughput_ratio=ratio(lambda p: p.tokens_per_second),
        latency_ratio=ratio(lambda p: p.latency),
        # Forwards per second are tokens per second times forwards per token.
        forwards_per_second_ratio=ratio(
            lambda p: p.tokens_per_second * p.forwards / max(1, sum(map(len, p.ids)))
        ),
        equal=min(
            sum(a == b for a, b in zip(base.ids, mine.ids, strict=True))
            for base, mine in pairs
        ),
    )


def reference_ask(
    model_path: str, algorithm: str, options: dict[str, Any], canvas: int
) -> Ask:
    import torch

    from reference.algorithms import run
    from reference.decoding import visible
    from reference.models import load

    model = load(model_path)

    @torch.no_grad()
    def ask(prompt: list[int]) -> Reply:
        began = perf_counter()
        result = run(algorithm, model, prompt, canvas, options)
        seconds = perf_counter() - began
        return Reply(visible(result, model.eos_id), result.nfe, seconds)

    return ask


def used_options(
    effective: dict[str, Any] | None, asked: dict[str, Any]
) -> dict[str, Any]:
    """What the server says it used: its YAML may have other defaults than ours."""
    if effective is None:
        return asked
    return {key: value for key, value in effective.items() if key != "algorithm"}


def questions_of(data: Path | None, num: int) -> list[str]:
    if data:
        return [problem.question for problem in read_problems(data, num)]
    return heldout_questions(num)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add, count = parser.add_argument, at_least(1, int)
    add("--model-path", help="checkpoint folder; default: the demo model")
    add("--base-url", help="a running server of it; default: one is started")
    add("--algorithm", default="FullAttnMultiBlock")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--data", type=Path, help="JSONL of question; default: held-out demo problems")
    add("--num", type=count, default=16, help="problems a round")
    add("--max-new-tokens", type=count, default=64)
    add("--concurrency", type=count, nargs="+", default=[1, 16])
    add("--rounds", type=at_least(5, int), default=5)
    add("--json", type=Path)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from sglang_dllm.demo import demo_path

    model_path = args.model_path or str(demo_path())
    with ExitStack() as stack:
        base_url = args.base_url and args.base_url.rstrip("/")
        if base_url is None:
            server = stack.enter_context(local_server(model_path, args.algorithm))
            base_url = server.base_url
        return measure_server(args, base_url, model_path)


def measure_server(
    args: argparse.Namespace, base_url: str, model_path: str
) -> dict[str, Any]:
    options = dict(args.option)
    prompts = chat_prompts(model_path, questions_of(args.data, args.num))
    dllm = {"algorithm": args.algorithm, **options}
    ours = server_ask(base_url, dllm, args.max_new_tokens)
    # One prompt each first: nothing is timed cold, and what is refused ends here.
    options = used_options(ours(prompts[0]).dllm, options)
    try:
        reference = reference_ask(
            model_path, args.algorithm, options, args.max_new_tokens
        )
        reference(prompts[0])
    except (KeyError, ValueError) as error:
        raise BenchmarkError(f"the reference refuses: {error}") from None
    base: list[Pass] = []
    passes: dict[int, list[Pass]] = {n: [] for n in args.concurrency}
    for _ in range(args.rounds):
        base.append(one_pass(reference, prompts, 1))
        for concurrency, done in passes.items():
            done.append(one_pass(ours, prompts, concurrency))
    return {
        "algorithm": args.algorithm,
        "options": options,
        "max_new_tokens": args.max_new_tokens,
        "problems": len(prompts),
        "rounds": args.rounds,
        "reference": asdict(compare(base, base)),
        "server": {n: asdict(compare(base, done)) for n, done in passes.items()},
    }


def show(figures: dict[str, Any]) -> str:
    columns = {"reference": figures["reference"]}
    columns |= {f"server, {n} at once": row for n, row in figures["server"].items()}
    total = figures["problems"]
    head = f"{'':<22}{'tok/s':>9}{'ratio':>7}{'latency':>9}{'ratio':>7}"
    lines = [f"{head}{'forwards':>10}{'fwd/s ratio':>13}{'equal':>9}"]
    for name, row in columns.items():
        lines.append(
            f"{name:<22}{row['tokens_per_second']:>9.1f}{row['throughput_ratio']:>7.2f}"
            f"{row['latency']:>9.3f}{row['latency_ratio']:>7.2f}{row['forwards']:>10}"
            f"{row['forwards_per_second_ratio']:>13.2f}"
            f"{row['equal']:>6}/{total}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("compare_reference.py", measure, show, args, problem)


def problem(figures: dict[str, Any]) -> str | None:
    wrong = any(r["equal"] < figures["problems"] for r in figures["server"].values())
    return "tokens differ from the reference" if wrong else None


if __name__ == "__main__":
    sys.exit(main())
