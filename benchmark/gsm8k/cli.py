"""GSM8K-style accuracy, tokens per forward and speed of a running server.

    python -m benchmark.gsm8k --base-url http://127.0.0.1:30000 --data test.jsonl \
        --algorithm FastDLLM --sweep threshold=0.5,0.7,0.9 \
        --json OUT.json --plot OUT.png

The data file has one JSON object a line, as GSM8K's own files: ``question``, and an
``answer`` that ends in ``#### N``. Any server of the OpenAI protocol can be asked. Only
ours tells its forwards, so TPF needs our server. See docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.command import (
    BenchmarkError,
    OneLineParser,
    at_least,
    parse_option,
    value_of,
)
from benchmark.gsm8k import report
from benchmark.gsm8k.client import Client
from benchmark.gsm8k.problems import (
    EXTRACTORS,
    PROMPT_FORMS,
    Problem,
    read_problems,
)
from benchmark.gsm8k.run import Settings, run
from benchmark.gsm8k.store import Store


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Read ``KEY=VALUE,VALUE,…``."""
    key, sign, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not (key.strip() and sign and all(parts)):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,VALUE,…, found {text!r}")
    if len(set(parts)) != len(parts):
        raise argparse.ArgumentTypeError(f"a value comes twice in {text!r}")
    return key.strip(), [value_of(part) for part in parts]


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers, found {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    count, share = at_least(1, int), at_least(0, float, 1)
    doc = (__doc__ or "").splitlines()[0]
    parser = OneLineParser(prog="gsm8k", description=doc)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000")
    add("--data", type=Path, required=True, help="JSONL of question and answer")
    add("--api", choices=["auto", "native", "openai"], default="auto")
    add("--model", help="name of the model; default: the served one")
    add("--tokenizer", help="folder or id, for the counts of re-tokenised text")
    add("--num", type=count, help="only the first N problems")
    add("--prompt", choices=list(PROMPT_FORMS), default="chat")
    add("--shots", type=at_least(0, int), default=0, help="worked examples")
    add("--shots-data", type=Path, help="JSONL file of the worked examples")
    add("--algorithm", help="dllm algorithm; default: the server's")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--sweep", type=parse_sweep, metavar="KEY=V1,V2,…", help="one run a value")
    add("--max-new-tokens", type=count, default=256)
    add("--temperature", type=at_least(0, float), default=0.0)
    add("--seed", type=_seeds, default=[None], metavar="N[,N…]", help="one run a seed")
    add("--ignore-eos", action="store_true", help="decode the whole canvas")
    add("--stop-at", choices=["server", "client"], default="server")
    add("--extract", choices=list(EXTRACTORS), default="last")
    add("--concurrency", type=count, default=8)
    add("--warmup", type=at_least(0, int), default=0, help="first N: accuracy only")
    add("--timeout", type=at_least(1, float), default=600.0, help="seconds a request")
    add("--json", type=Path, help="write figures; answers go to OUT.answers.jsonl")
    add("--fresh", action="store_true", help="forget the answers of earlier runs")
    add("--plot", type=Path, help="draw accuracy against TPF")
    add("--aup-best", type=at_least(0, float, 100), metavar="PERCENT")
    add("--min-accuracy", type=share, help="0 to 1; below it the exit status is 1")
    add("--min-tpf", type=at_least(0, float), help="the same for tokens per forward")
    return parser


def missed_gates(
    runs: Sequence[report.Run], min_accuracy: float | None, min_tpf: float | None
) -> list[str]:
    """One text for each run and bound that the run is below."""
    missed = []
    for one in runs:
        accuracy, tpf = one.summary.accuracy, one.summary.tokens_per_forward
        if min_accuracy is not None and accuracy < min_accuracy:
            missed.append(f"{one.title}: accuracy {accuracy:.4f} < {min_accuracy:g}")
        if min_tpf is not None and tpf is None:
            missed.append(f"{one.title}: the server does not tell its forwards")
        elif min_tpf is not None and tpf is not None and tpf < min_tpf:
            missed.append(f"{one.title}: TPF {tpf:.3f} < {min_tpf:g}")
    return missed


def measure(args: argparse.Namespace) -> list[report.Run]:
    """All runs of a command line. Each is printed when it ends."""
    problems = read_problems(args.data, args.num)
    if args.warmup >= len(problems):
        raise BenchmarkError(
            f"--warmup {args.warmup} leaves none of {len(problems)} problems"
        )
    shots: list[Problem] = []
    if args.shots:
        if args.shots_data is None:
            raise BenchmarkError("--shots needs --shots-data FILE")
        shots = read_problems(args.shots_data, args.shots)
        if len(shots) < args.shots:
            raise BenchmarkError(f"{args.shots_data} has {len(shots)} problems only")
    options = dict(args.option)
    if args.algorithm:
        options["algorithm"] = args.algorithm
    key, values = args.sweep or (None, [None])
    if key in options:
        raise BenchmarkError(f"{key} is given twice: by --sweep and by --option")
    client = Client(
        args.base_url,
        args.api,
        model=args.model,
        tokenizer=args.tokenizer,
        timeout=args.timeout,
    )
    path = args.json and args.json.with_suffix(".answers.jsonl")
    if path and args.fresh:
        path.unlink(missing_ok=True)
    store, runs = Store(path), []
    for value in values:
        for seed in args.seed:
            settings = Settings(
                prompt=args.prompt,
                shots=tuple(shots),
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=seed,
                ignore_eos=args.ignore_eos,
                dllm=options if key is None else {**options, key: value},
                stop_at=args.stop_at,
                extract=args.extract,
                concurrency=args.concurrency,
            )
            label = None if key is None else f"{key}={value}"
            outcome = run(
                *(client, problems, settings),
                **{"warmup": args.warmup, "store": store, "title": label or ""},
            )
            shown = {**asdict(settings), "model": client.model, "api": client.api}
            shown |= {"shots": len(shots), "warmup": args.warmup}
            runs.append(
                report.Run(label, seed, shown, outcome.effective, outcome.summary)
            )
            print(report.text(runs[-1]), flush=True)
            if args.json:
                report.write_json(args.json, runs, args.aup_best)
    summed = report.sweep_text(runs, args.aup_best)
    if summed:
        print(summed)
    if args.plot:
        title = args.algorithm or client.model
        title += f", labels: {key}" if key else ""
        report.draw(args.plot, runs, title)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        runs = measure(args)
    except BenchmarkError as error:
        print(f"gsm8k: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; the same command goes on from here" if args.json else ""
        print(f"gsm8k: stopped{kept}", file=sys.stderr)
        return 130
    missed = missed_gates(runs, args.min_accuracy, args.min_tpf)
    if missed:
        print(f"gsm8k: missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0
