"""What rounds would cost that do not look at the canvases between their steps.

    python benchmark/blind_rounds.py [--num 50] [--model-path DIR] [--json OUT]

After every denoising step one small transfer tells the host which canvases are done and
what the next forward computes. A round of k steps without it would save k - 1 waits,
and run on to its end where a canvas is done before: a request of F forwards would cost
the next multiple of k. Held-out problems of the demo model, by each rule as published;
printed: forwards per request, and how many more of them rounds of k would run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from local_server import (
    ask_all,
    chat_prompts,
    heldout_questions,
    local_server,
    run_command,
    server_ask,
)

from gsm8k import OneLineParser, at_least

ALGORITHMS: dict[str, dict[str, Any]] = {
    "FullAttnMultiBlock": {},
    "EntropyThreshold": {"threshold": 0.1},
    "FastDLLM": {},
    "LLaDA": {},
}
STEPS = (2, 4, 8)


def wasted(forwards: Sequence[int], steps: int) -> float:
    """Forwards behind the end of their request, as a share of all that it needs."""
    return sum(-count % steps for count in forwards) / sum(forwards)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model-path", help="checkpoint folder; default: the demo model")
    add("--num", type=at_least(1, int), default=50, help="problems")
    add("--max-new-tokens", type=at_least(1, int), default=128)
    add("--json", type=Path)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from sglang_dllm.demo import demo_path

    model_path = args.model_path or str(demo_path())
    prompts = chat_prompts(model_path, heldout_questions(args.num))
    found = {}
    with local_server(model_path, "FullAttnMultiBlock") as server:
        for name, options in ALGORITHMS.items():
            dllm = {"algorithm": name, **options}
            ask = server_ask(server.base_url, dllm, args.max_new_tokens)
            replies, _ = ask_all(ask, prompts, 4)
            forwards = [reply.forwards for reply in replies]
            found[name] = {
                "forwards": mean(forwards),
                "wasted": {steps: wasted(forwards, steps) for steps in STEPS},
            }
    return {"problems": args.num, "algorithms": found}


def show(figures: dict[str, Any]) -> str:
    lines = [f"{'algorithm':<20}{'forwards':>9}" + "".join(f"{k:>7}" for k in STEPS)]
    for name, row in figures["algorithms"].items():
        shares = "".join(f"{share:>+7.0%}" for share in row["wasted"].values())
        lines.append(f"{name:<20}{row['forwards']:>9.1f}{shares}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command("blind_rounds.py", measure, show, args)


if __name__ == "__main__":
    sys.exit(main())
