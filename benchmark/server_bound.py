"""Our server against the bare model that runs the same packed forwards.

    python benchmark/server_bound.py [--algorithm NAME] [--option KEY=VALUE] \
        [--model-path DIR] [--steps-per-round N] [--json OUT]

In a process of its own the prompts are decoded in one batch, which tells the packed
forwards that they need. Then rounds take turns: there exactly these forwards, the head
over the candidates included and nothing between them; here the server, asked the same
prompts all at once by requests of their own. Printed, medians over the rounds:

- speed: bare seconds over the server's, 1.0 where the server costs nothing. Also per
  canvas row computed, where both computed a different number of rows;
- the scheduler process: its CPU seconds (all threads, kernel included) beyond those
  of the bare forwards, scaled to its number of rows, as a share of all.

The bare model starts all prompts together and has one batch a step; the server runs
smaller batches while requests arrive, which is not free of cost either.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from local_server import (
    BenchmarkError,
    ask_all,
    chat_prompts,
    cpu_seconds,
    heldout_questions,
    local_server,
    median_ratio,
    run_command,
    scheduler_of,
    server_ask,
)
from subprocess_worker import in_subprocess

from gsm8k import OneLineParser, at_least, parse_option

OPTIONS: dict[str, dict[str, Any]] = {"EntropyThreshold": {"threshold": 0.0}}
"""Where none are given: one token a forward, or little more."""


@dataclass(frozen=True)
class Round:
    """All prompts once, by one of the two. ``forwards`` are summed over requests."""

    seconds: float
    cpu_seconds: float
    rows: int
    forwards: int


def compare(bare: Sequence[Round], server: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds, of figures and of each round's ratio."""
    pairs = list(zip(bare, server, strict=True))
    return {
        "bare_seconds": median(r.seconds for r in bare),
        "server_seconds": median(r.seconds for r in server),
        "bare_us_per_row": median(1e6 * r.seconds / r.rows for r in bare),
        "server_us_per_row": median(1e6 * r.seconds / r.rows for r in server),
        "bare_cpu_seconds": median(r.cpu_seconds for r in bare),
        "scheduler_cpu_seconds": median(r.cpu_seconds for r in server),
        "bare_rows": bare[0].rows,
        "server_rows": server[0].rows,
        "bare_forwards": bare[0].forwards,
        "server_forwards": server[0].forwards,
        "speed": median_ratio([r.seconds for r in bare], [r.seconds for r in server]),
        "speed_per_row": median_ratio(
            [r.seconds / r.rows for r in bare], [r.seconds / r.rows for r in server]
        ),
        "outside_share": median(outside_share(b, s) for b, s in pairs),
    }


def outside_share(bare: Round, server: Round) -> float:
    """Of the scheduler's CPU seconds, what the forwards of its rows do not account
    for."""
    model = bare.cpu_seconds * server.rows / bare.rows
    return 1 - model / server.cpu_seconds


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add, count = parser.add_argument, at_least(1, int)
    add("--model-path", help="checkpoint folder; default: the demo model")
    add("--algorithm", default="EntropyThreshold")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--num", type=count, default=16, help="prompts, all asked at once")
    add("--max-new-tokens", type=count, default=64)
    add("--rounds", type=at_least(5, int), default=5)
    add("--steps-per-round", type=count, help="of the server; default: its own")
    add("--json", type=Path)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from sglang_dllm.demo import demo_path

    model_path = args.model_path or str(demo_path())
    options = dict(args.option) or OPTIONS.get(args.algorithm, {})
    prompts = chat_prompts(model_path, heldout_questions(args.num))
    dllm = {"algorithm": args.algorithm, **options}
    bare: list[Round] = []
    ours: list[Round] = []
    with ExitStack() as stack:
        flags = ["--max-running-requests", str(max(64, args.num))]
        if args.steps_per_round:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = folder / "dllm.yaml"
            config.write_text(f"steps_per_round: {args.steps_per_round}\n")
            flags += ["--dllm-algorithm-config", str(config)]
        call = stack.enter_context(
            in_subprocess(
                *("bare_model:BareModel", model_path, prompts, args.max_new_tokens),
                *(args.algorithm, options),
            )
        )
        server = stack.enter_context(local_server(model_path, args.algorithm, *flags))
        scheduler = scheduler_of(server)
        ask = server_ask(server.base_url, dllm, args.max_new_tokens)
        summary = call("summary")
        replies, _ = ask_all(ask, prompts, args.num)
        equal = sum(
            reply.ids == answer
            for reply, answer in zip(replies, summary["answers"], strict=True)
        )
        if equal < len(prompts):
            raise BenchmarkError(
                f"{len(prompts) - equal} of {len(prompts)} answers are not the bare "
                "model's: their forwards do not compare"
            )
        call("run")
        for _ in range(args.rounds):
            seconds, cpu = call("run")
            bare.append(Round(seconds, cpu, summary["rows"], summary["forwards"]))
            before = cpu_seconds(scheduler)
            replies, seconds = ask_all(ask, prompts, args.num)
            ours.append(
                Round(
                    seconds,
                    cpu_seconds(scheduler) - before,
                    sum(reply.meta["tokens_computed"] for reply in replies),
                    sum(reply.forwards for reply in replies),
                )
            )
    return {
        **dllm,
        "problems": args.num,
        "max_new_tokens": args.max_new_tokens,
        "rounds": args.rounds,
        "threads": summary["threads"],
        "packed_forwards": summary["packed_forwards"],
        "head_rows": summary["head_rows"],
        **compare(bare, ours),
    }


def show(figures: dict[str, Any]) -> str:
    f = figures
    head = f"{'':<14}{'seconds':>9}{'rows':>9}{'us/row':>9}{'forwards':>10}{'CPU s':>8}"
    lines = [head]
    for key, name, cpu in (
        ("bare", "bare model", "bare_cpu_seconds"),
        ("server", "server", "scheduler_cpu_seconds"),
    ):
        lines.append(
            f"{name:<14}{f[f'{key}_seconds']:>9.3f}{f[f'{key}_rows']:>9}"
            f"{f[f'{key}_us_per_row']:>9.1f}{f[f'{key}_forwards']:>10}{f[cpu]:>8.3f}"
        )
    return "\n".join(
        [
            *lines,
            f"{f['problems']} prompts at once, {f['packed_forwards']} packed forwards "
            f"of the bare model, {f['threads']} thread(s), {f['rounds']} rounds",
            f"speed of the server, bare = 1: {f['speed']:.2f} "
            f"(per row computed {f['speed_per_row']:.2f})",
            "CPU time of the scheduler process outside the model's forwards: "
            f"{100 * f['outside_share']:.1f} %",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("server_bound.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
