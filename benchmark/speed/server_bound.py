"""The server against the bare model that runs the same packed forwards.

    python -m benchmark.speed.server_bound [--algorithm NAME] [--option KEY=VALUE] \
        [--model-path DIR] [--steps-per-round N] [--json OUT]

A process of its own decodes the prompts in one batch and records the packed forwards.
Then two sides take turns. The bare model runs exactly these forwards, with the head
over the candidates and nothing between them. The server answers the same prompts, each
asked by a request of its own, all at once. The table has medians over the rounds:

- speed: seconds of the bare model over the server's, 1.0 for a server that costs
nothing.
  It is given per token computed too, since both sides may compute a different number;
- the scheduler process: its CPU seconds (all threads, kernel included) beyond those of
  the bare forwards, scaled to its number of tokens, as a share of all.

The bare model starts all prompts together, while the server runs smaller batches until
the last request has arrived.
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

from benchmark.command import (
    BenchmarkError,
    Figures,
    at_least,
    options_of,
    run_command,
    speed_parser,
)
from benchmark.server import (
    ask_all,
    cpu_seconds,
    heldout_prompts,
    local_server,
    median_ratio,
    scheduler_of,
    server_ask,
)
from benchmark.subprocess_worker import in_subprocess


@dataclass(frozen=True)
class Round:
    """All prompts once, by one of the two sides.

    Attributes:
        tokens: tokens computed, summed over the forwards.
        forwards: NFE, summed over the requests.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    forwards: int


def compare(bare: Sequence[Round], server: Sequence[Round]) -> Figures:
    """Medians over the rounds, and medians of the ratios of each round."""
    pairs = list(zip(bare, server, strict=True))
    return {
        "bare_seconds": median(r.seconds for r in bare),
        "server_seconds": median(r.seconds for r in server),
        "bare_us_per_token": median(1e6 * r.seconds / r.tokens for r in bare),
        "server_us_per_token": median(1e6 * r.seconds / r.tokens for r in server),
        "bare_cpu_seconds": median(r.cpu_seconds for r in bare),
        "scheduler_cpu_seconds": median(r.cpu_seconds for r in server),
        "bare_tokens": bare[0].tokens,
        "server_tokens": server[0].tokens,
        "bare_forwards": bare[0].forwards,
        "server_forwards": server[0].forwards,
        "speed": median_ratio([r.seconds for r in bare], [r.seconds for r in server]),
        "speed_per_token": median_ratio(
            [r.seconds / r.tokens for r in bare],
            [r.seconds / r.tokens for r in server],
        ),
        "outside_share": median(outside_share(b, s) for b, s in pairs),
    }


def outside_share(bare: Round, server: Round) -> float:
    """The share of the scheduler's CPU time that its forwards do not explain."""
    model = bare.cpu_seconds * server.tokens / bare.tokens
    return 1 - model / server.cpu_seconds


def build_parser() -> argparse.ArgumentParser:
    parser = speed_parser(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--num", type=count, default=16, help="prompts, all asked at once")
    add("--max-new-tokens", type=count, default=64)
    add("--steps-per-round", type=count, help="of the server; default: its own")
    return parser


def measure(args: argparse.Namespace) -> Figures:
    options = options_of(args)
    prompts = heldout_prompts(args.model_path, args.num)
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
                "benchmark.speed.bare_model:BareModel",
                *(args.model_path, prompts, args.max_new_tokens),
                *(args.algorithm, options),
            )
        )
        server = stack.enter_context(
            local_server(args.model_path, args.algorithm, *flags)
        )
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
            bare.append(Round(seconds, cpu, summary["tokens"], summary["forwards"]))
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
        "logits": summary["logits"],
        **compare(bare, ours),
    }


def show(figures: Figures) -> str:
    f = figures
    head = f"{'':<14}{'seconds':>9}{'tokens':>9}{'us/token':>10}{'forwards':>10}"
    lines = [f"{head}{'CPU s':>8}"]
    for key, name, cpu in (
        ("bare", "bare model", "bare_cpu_seconds"),
        ("server", "server", "scheduler_cpu_seconds"),
    ):
        lines.append(
            f"{name:<14}{f[f'{key}_seconds']:>9.3f}{f[f'{key}_tokens']:>9}"
            f"{f[f'{key}_us_per_token']:>10.1f}{f[f'{key}_forwards']:>10}{f[cpu]:>8.3f}"
        )
    return "\n".join(
        [
            *lines,
            f"{f['problems']} prompts at once, {f['packed_forwards']} packed forwards "
            f"of the bare model, {f['threads']} thread(s), {f['rounds']} rounds",
            f"speed of the server, bare = 1: {f['speed']:.2f} "
            f"(per token computed {f['speed_per_token']:.2f})",
            "CPU time of the scheduler process outside the model's forwards: "
            f"{100 * f['outside_share']:.1f} %",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
