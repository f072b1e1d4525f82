"""The command line of a benchmark: its arguments, its output, its exit status."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Figures = dict[str, Any]


class BenchmarkError(Exception):
    """Ends a benchmark. Its text is one line for people."""


class OneLineParser(argparse.ArgumentParser):
    """Prints one line for bad arguments, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser_of(doc: str | None) -> OneLineParser:
    """A parser with ``--json``. Its description is the first line of a docstring."""
    parser = OneLineParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def speed_parser(doc: str | None) -> OneLineParser:
    """The arguments that the benchmarks of an algorithm share."""
    parser = parser_of(doc)
    add = parser.add_argument
    add("--model-path", default=_demo_path(), help="checkpoint folder; default: demo")
    add("--algorithm", default="EntropyThreshold")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--rounds", type=at_least(5, int), default=5, help="repetitions, 5 or more")
    return parser


def _demo_path() -> str:
    from sglang_dllm.demo import demo_path

    return str(demo_path())


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line of ``speed_parser``.

    Without any, ``EntropyThreshold`` gets the threshold 0. It then commits little more
    than one token a forward, which gives the caches many forwards to save.
    """
    if not args.option and args.algorithm == "EntropyThreshold":
        return {"threshold": 0.0}
    return dict(args.option)


def value_of(text: str) -> Any:
    """A JSON value (0.5, true), or the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_option(text: str) -> tuple[str, Any]:
    """Read ``KEY=VALUE``."""
    key, sign, value = text.partition("=")
    if not (key.strip() and sign and value.strip()):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    return key.strip(), value_of(value.strip())


def at_least(low: float, kind: type, high: float = float("inf")) -> Any:
    """An argument type: a number of ``kind`` from ``low`` to ``high``."""

    def read(text: str) -> Any:
        wanted = "an integer" if kind is int else "a number"
        span = f"from {low:g}" + (f" to {high:g}" if high < float("inf") else "")
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected {wanted} {span}, found {text!r}"
            )
        return value

    return read


def run_command(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Figures],
    show: Callable[[Figures], str],
    problem: Callable[[Figures], str | None] = lambda figures: None,
    arguments: list[str] | None = None,
) -> int:
    """Measure, print a table and write ``--json``.

    Args:
        problem: says in one line why the figures are wrong, or returns None.

    Returns:
        The exit status. A failure prints one line and gives 1.
    """
    args = parser.parse_args(arguments)
    # A server has a process group of its own. It would outlive a killed benchmark.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        figures = measure(args)
    except (BenchmarkError, RuntimeError, OSError, ValueError) as error:
        # A server that did not start raises its log, whose last line has the reason.
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"{parser.prog}: {lines[-1]}", file=sys.stderr)
        return 1
    print(show(figures), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    wrong = problem(figures)
    if wrong:
        print(f"{parser.prog}: {wrong}", file=sys.stderr)
    return 1 if wrong else 0
