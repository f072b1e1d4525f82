"""The cost of a form: answers with a JSON schema of five fields, and without one.

    python -m benchmark.speed.structure [--rounds 5] [--json OUT.json]

One server answers the same prompts with and without the schema, in turns, one request
at a time and 16 at once; then 15 plain requests beside one with the schema. An answer
without the schema fills its canvas (``ignore_eos``), so that both decode canvases of
one size. A structured answer ends earlier and has fewer tokens, and its request leaves
the batch earlier. So the milliseconds of a forward compare like with like for one
request at a time alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

from benchmark.command import Figures, at_least, run_command, speed_parser
from benchmark.server import (
    Ask,
    Reply,
    chat_prompts,
    local_server,
    median_ratio,
    server_ask,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Berlin", "Lagos", "Lima", "Osaka"]},
        "member": {"type": "boolean"},
        "scores": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "age", "city", "member", "scores"],
}
AT_ONCE = 16
ALONE = 6
"""Requests of a round that are asked one after the other."""


@dataclass(frozen=True)
class Pass:
    """Some requests that were asked at once.

    Attributes:
        speed: tokens per second of all of them.
        plain, structured: milliseconds of a forward, the median of the requests. 0
            where there was none.
        tokens, forwards: of an answer, the mean of all.
    """

    speed: float
    plain: float
    structured: float
    tokens: float
    forwards: float


def pass_of(
    replies: Sequence[Reply], is_structured: Sequence[bool], seconds: float
) -> Pass:
    """The figures of requests that took so many seconds together."""

    def of_forward(wanted: bool) -> float:
        some = [
            1000 * reply.seconds / reply.forwards
            for reply, has_form in zip(replies, is_structured, strict=True)
            if has_form == wanted
        ]
        return median(some) if some else 0.0

    num_tokens = sum(len(reply.ids) for reply in replies)
    return Pass(
        num_tokens / seconds,
        of_forward(False),
        of_forward(True),
        num_tokens / len(replies),
        sum(reply.forwards for reply in replies) / len(replies),
    )


def run_pass(
    plain: Ask,
    structured: Ask,
    prompts: Sequence[list[int]],
    at_once: int,
    num_structured: int,
) -> Pass:
    """Ask all prompts, the first ones with the form."""
    is_structured = [index < num_structured for index in range(len(prompts))]
    asks = [structured if has_form else plain for has_form in is_structured]
    began = perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        replies = list(pool.map(lambda ask, prompt: ask(prompt), asks, prompts))
    return pass_of(replies, is_structured, perf_counter() - began)


def figures_of(passes: dict[str, list[Pass]]) -> Figures:
    """Medians of each case, and the ratios of the same rounds."""
    found: Figures = {
        name: {
            key: median(asdict(one)[key] for one in rounds) for key in asdict(rounds[0])
        }
        for name, rounds in passes.items()
    }

    def forward(name: str, kind: str) -> list[float]:
        return [getattr(one, kind) for one in passes[name]]

    for num in ("1", str(AT_ONCE)):
        base, ours = passes[f"plain {num}"], passes[f"structured {num}"]
        found[f"speed {num}"] = median_ratio(
            [one.speed for one in ours], [one.speed for one in base]
        )
        found[f"forward {num}"] = median_ratio(
            forward(f"structured {num}", "structured"), forward(f"plain {num}", "plain")
        )
    found["forward of others"] = median_ratio(
        forward("mixed", "plain"), forward(f"plain {AT_ONCE}", "plain")
    )
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = speed_parser(__doc__)
    parser.set_defaults(algorithm="FullAttnMultiBlock")
    parser.add_argument("--max-new-tokens", type=at_least(80, int), default=96)
    return parser


def measure(args: argparse.Namespace) -> Figures:
    questions = [f"Who is number {index}?" for index in range(AT_ONCE)]
    prompts = chat_prompts(args.model_path, questions)
    cases = {
        "plain 1": (1, 0),
        "structured 1": (1, AT_ONCE),
        f"plain {AT_ONCE}": (AT_ONCE, 0),
        f"structured {AT_ONCE}": (AT_ONCE, AT_ONCE),
        "mixed": (AT_ONCE, 1),
    }
    dllm = {"algorithm": args.algorithm, **dict(args.option)}
    passes: dict[str, list[Pass]] = {name: [] for name in cases}
    with local_server(args.model_path, args.algorithm) as server:
        url, num = server.base_url, args.max_new_tokens
        plain = server_ask(url, dllm, num, ignore_eos=True)
        structured = server_ask(url, dllm, num, json_schema=json.dumps(SCHEMA))
        # The first round compiles the schema, and warms both up.
        for index in range(args.rounds + 1):
            for name, (at_once, num_structured) in cases.items():
                some = prompts[: max(at_once, ALONE)]
                found = run_pass(plain, structured, some, at_once, num_structured)
                if index:
                    passes[name].append(found)
    return {**dllm, "rounds": args.rounds, "answer_len": num, **figures_of(passes)}


def show(figures: Figures) -> str:
    lines = [
        "| at once | tokens/s, plain | with a schema | ratio | ms a forward, plain "
        "| with a schema | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for num in ("1", str(AT_ONCE)):
        plain, ours = figures[f"plain {num}"], figures[f"structured {num}"]
        lines.append(
            f"| {num} | {plain['speed']:.0f} | {ours['speed']:.0f} "
            f"| {figures[f'speed {num}']:.2f} | {plain['plain']:.1f} "
            f"| {ours['structured']:.1f} | {figures[f'forward {num}']:.2f} |"
        )
    mixed, alone = figures["mixed"], figures[f"plain {AT_ONCE}"]
    lines.append(
        f"\n{AT_ONCE - 1} plain requests beside one with a schema: "
        f"{mixed['plain']:.1f} ms a forward, {alone['plain']:.1f} beside a plain one, "
        f"ratio {figures['forward of others']:.2f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
