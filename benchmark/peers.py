"""Our server, dlmserve, a plain loop and llama.cpp on one generated checkpoint.

    python -m benchmark.peers [--rounds 5] [--busy-rounds 3] [--quick] \
        [--packages DIR] [--gguf FILE] [--json OUT] [--markdown OUT]

The checkpoint is a LLaDA of 460 million random bf16 parameters with the published
vocabulary. Each request is a prompt of 88 tokens and an answer of 128 in 16 steps and
blocks of 32. All engines run with their defaults on this machine's CPU and answer in
turns, so that a slow moment slows all of them. The ratios are medians of the rounds.

dlmserve and the transformers that it wants are installed from PyPI into --packages.
llama.cpp takes part where `llama-diffusion-cli` is on the PATH and --gguf names the
checkpoint as `python -m benchmark.peer.gguf` writes it. It has no server, so that only
its time of a step is known, at a canvas of 256. The ratio takes ours as growing from
216 to 256 with the canvas, which is to our disadvantage.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmark.command import Figures, at_least, parser_of, run_command
from benchmark.peer.checkpoint import write_checkpoint
from benchmark.peer.engines import (
    ANSWER_LEN,
    LLAMA_CPP,
    LLAMA_CPP_CANVAS,
    PROMPT_LEN,
    STEPS,
    Engine,
    dlmserve,
    install_dlmserve,
    llama_cpp_step,
    our_server,
    prompts,
)
from benchmark.server import median_ratio
from benchmark.subprocess_worker import in_subprocess

BUSY = 8
BASE = "dlmserve"
CACHES = ("none", "dual")


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--rounds", type=count, default=5, help="of one request at a time")
    add("--busy-rounds", type=count, default=3, help=f"of {BUSY} requests at once")
    add("--quick", action="store_true", help="one round of each")
    add("--packages", type=Path, help="folder of dlmserve; default: a temporary one")
    add("--gguf", type=Path, help="the checkpoint, converted for llama.cpp")
    add("--markdown", type=Path, help="write the table with machine and versions here")
    return parser


@contextmanager
def engines(folder: Path, packages: Path, logs: Path) -> Iterator[list[Engine]]:
    """All engines, started. They are stopped at the end."""
    with ExitStack() as stack:
        found = our_server(folder, logs / "ours", CACHES)
        stack.callback(found[0].stop)
        found.append(dlmserve(folder, packages, logs / "dlmserve"))
        stack.callback(found[-1].stop)
        loop = in_subprocess("benchmark.peer.engines:PlainLoop", str(folder))
        call = stack.enter_context(loop)
        found.append(
            Engine(
                "plain loop",
                lambda texts: float(call("answer", texts)),
                lambda: int(call("peak_memory")),
                lambda: None,
            )
        )
        yield found


def measure(args: argparse.Namespace) -> Figures:
    rounds, busy = (1, 1) if args.quick else (args.rounds, args.busy_rounds)
    with tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch)
        packages = args.packages or temporary / "packages"
        install_dlmserve(packages)
        # Engines look for the family's name in the folder's.
        folder = write_checkpoint(temporary / "llada")
        with engines(folder, packages, temporary) as found:
            seconds = _timed(found, rounds, busy)
            peaks = {engine.name: engine.peak_memory() for engine in found}
    rows = {name: _row(name, seconds, peaks[name]) for name in peaks}
    figures: Figures = {"rounds": rounds, "busy_rounds": busy, "engines": rows}
    if args.gguf and shutil.which(LLAMA_CPP):
        steps = [llama_cpp_step(args.gguf) for _ in range(rounds)]
        figures["llama_cpp_step_ms"] = median(steps)
    if args.markdown:
        args.markdown.write_text(markdown(figures), encoding="utf-8")
    return figures


def _timed(
    found: Sequence[Engine], rounds: int, busy: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each pass, by the number of requests at once and the engine."""
    for engine in found:  # the first request loads code and makes kernels
        engine.answer(prompts(1))
    seconds: dict[int, dict[str, list[float]]] = {}
    for at_once, number in ((1, rounds), (BUSY, busy)):
        seconds[at_once] = {engine.name: [] for engine in found}
        for _ in range(number):
            for engine in found:
                if at_once > 1 and engine.name == "plain loop":
                    continue  # it takes one text after the other
                seconds[at_once][engine.name].append(engine.answer(prompts(at_once)))
    return seconds


def _row(name: str, seconds: dict[int, dict[str, list[float]]], peak: int) -> Any:
    row: dict[str, Any] = {"peak_memory": peak}
    for at_once, by_name in seconds.items():
        passes = by_name[name] or [at_once * s for s in seconds[1][name]]
        base = by_name[BASE]
        if len(passes) != len(base):  # the plain loop's passes of one text
            base = [median(base)] * len(passes)
        row[str(at_once)] = {
            "step_ms": 1000 * median(passes) / STEPS,
            "tokens_per_second": at_once * ANSWER_LEN / median(passes),
            "ratio": median_ratio(base, passes),
        }
    return row


def show(figures: Figures) -> str:
    head = f"{'':<14}{'ms/step':>9}{'tok/s':>8}{'ratio':>7}"
    lines = [f"{head}{f'tok/s, {BUSY}':>10}{'ratio':>7}{'peak MiB':>10}"]
    for name, row in figures["engines"].items():
        one, busy = row["1"], row[str(BUSY)]
        lines.append(
            f"{name:<14}{one['step_ms']:>9.0f}{one['tokens_per_second']:>8.1f}"
            f"{one['ratio']:>7.2f}{busy['tokens_per_second']:>10.1f}"
            f"{busy['ratio']:>7.2f}{row['peak_memory'] / 2**20:>10.0f}"
        )
    if step := figures.get("llama_cpp_step_ms"):
        ours = figures["engines"]["ours"]["1"]["step_ms"]
        ours *= LLAMA_CPP_CANVAS / (PROMPT_LEN + ANSWER_LEN)
        ratio = f"  ours is {step / ours:.2f} times as fast"
        lines.append(f"{'llama.cpp':<14}{step:>9.0f}{ratio}")
    else:
        lines.append(f"llama.cpp: not measured ({LLAMA_CPP} and --gguf are needed)")
    lines.append(f"ratio: to {BASE}'s speed in the same round")
    return "\n".join(lines)


def markdown(figures: Figures) -> str:
    """The table with date, versions and the machine in plain words."""
    packages = ("sglang", "torch", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = psutil.cpu_count(logical=False)
    return (
        f"# Peers on a CPU, {date.today()}\n\n"
        f"`python -m benchmark.peers`, {figures['rounds']} rounds of one request and "
        f"{figures['busy_rounds']} of {BUSY}. {versions}.\n"
        f"Machine: {platform.machine()}, {cores} cores, {_features()}.\n\n"
        f"```\n{show(figures)}\n```\n"
    )


def _features() -> str:
    import torch

    wanted = ("avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    found = torch.cpu.get_capabilities()
    return ", ".join(name for name in wanted if found.get(name)) or "no AVX-512"


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
