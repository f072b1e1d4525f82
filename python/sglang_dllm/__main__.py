"""``python -m sglang_dllm doctor``, ``demo-path``, ``replay`` and ``lm-eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_dllm")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check the installation; non-zero if broken")
    commands.add_parser("demo-path", help="print the demo checkpoint's folder")
    player = commands.add_parser("replay", help="show a trace in the terminal")
    player.add_argument("trace", type=Path, help="JSON of dllm.trace, or of an answer")
    player.add_argument(
        "--speed", type=_speed, default=10.0, help="forwards a second; default: 10"
    )
    player.add_argument("--step", action="store_true", help="wait for Enter instead")
    commands.add_parser(
        "lm-eval", help="lm-eval's own command line, with --model sglang_dllm"
    )
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:
        from sglang_dllm.lm_eval_model import run

        return run(argv[1:])
    args = parser.parse_args(argv)
    if args.command == "demo-path":
        from sglang_dllm.demo import demo_path

        print(demo_path())
        return 0
    if args.command == "replay":
        from sglang_dllm.replay import replay

        return replay(args.trace, sys.stdout, speed=args.speed, by_key=args.step)
    from sglang_dllm.doctor import report

    return report(sys.stdout)


def _speed(text: str) -> float:
    speed = float(text)
    if not 0 < speed <= 1000:
        raise argparse.ArgumentTypeError("expected a number above 0, up to 1000")
    return speed


if __name__ == "__main__":
    sys.exit(main())
