"""``python -m sglang_dllm doctor`` and ``demo-path``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_dllm")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check the installation; non-zero if broken")
    commands.add_parser("demo-path", help="print the demo checkpoint's folder")
    args = parser.parse_args(argv)
    if args.command == "demo-path":
        from sglang_dllm.demo import demo_path

        print(demo_path())
        return 0
    from sglang_dllm.doctor import report

    return report(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
