"""The cost of the programme of a form alone, without a server and a model.

    python -m benchmark.speed.strip_cost [--rounds 5] [--positions 32 96 1024] \
        [--json OUT.json]

A strip of masks, from the start of the answer, in a canvas with 1024 positions more.
The vocabulary has 126,000 synthetic tokens, the logits are random. The table has
milliseconds for the strip, microseconds for a position, and the ratio to numpy's argmax
over the logits of the strip in the same round: medians. The best logit of each class is
found before: that is a tensor operation on the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from benchmark.command import Figures, at_least, parser_of, run_command
from benchmark.server import median_ratio
from benchmark.speed.structure import SCHEMA
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import Programme, Strip
from sglang_dllm.grammar.forms import Form, compile_form
from sglang_dllm.grammar.token_automaton import Vocabulary

CALL = {
    "begin": '<tool_call>\n{"name": "add", "arguments": ',
    "schema": SCHEMA,
    "end": "}\n</tool_call>",
}
STRICT = {"structures": [CALL], "triggers": ["<tool_call>"]}
FORMS = {
    "schema": Form("json_schema", json.dumps(SCHEMA)),
    "json_object": Form("json_object"),
    "strict function": Form("structural_tag", json.dumps(STRICT)),
}
BEHIND = 1024


def large_vocabulary() -> Vocabulary:
    """126,000 tokens: bytes, numbers, marks of JSON, and words with what is around."""
    marks = [
        "".join(some)
        for num in (2, 3)
        for some in itertools.product('{}[]",: \n', repeat=num)
    ]
    numbers = [f"{i:0{digits}}" for digits in (2, 3) for i in range(10**digits)]
    words = ["".join(word) for word in itertools.product("etaoinshrdlu", repeat=4)]
    around = ("{}", " {}", '"{}', '{}": "', "{}\n", "{}éü")
    texts = [*marks, *numbers, *(one.format(word) for word in words for one in around)]
    tokens = [bytes([byte]) for byte in range(256)] + [one.encode() for one in texts]
    return Vocabulary([*tokens, None], [len(tokens)], len(tokens) + 1)


def class_scores(
    logits: npt.NDArray[np.float32], automaton: TokenAutomaton
) -> npt.NDArray[np.float64]:
    """``(R, C)``: the best logit of each class in ``(R, V)`` logits."""
    order = np.argsort(automaton.token_class, kind="stable")
    classes, begins = np.unique(automaton.token_class[order], return_index=True)
    scores = np.zeros((len(logits), automaton.num_classes + 1))
    for row, found in zip(logits, scores, strict=True):
        found[classes] = np.maximum.reduceat(row[order], begins)
    return scores


def milliseconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return 1000 * (perf_counter() - began)


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--rounds", type=at_least(5, int), default=5, help="repetitions, 5 or more")
    add("--positions", type=at_least(1, int), nargs="+", default=[32, 96, 1024])
    return parser


def measure(args: argparse.Namespace) -> Figures:
    vocabulary = large_vocabulary()
    rng = np.random.default_rng(0)
    found: Figures = {"rounds": args.rounds, "tokens": vocabulary.size, "strips": []}
    automata = {name: compile_form(form, vocabulary) for name, form in FORMS.items()}
    for num in args.positions:
        logits = rng.random((num, vocabulary.size), dtype=np.float32)
        for name, automaton in automata.items():
            strip = Strip(automaton, automaton.start, np.full(num, -1), BEHIND)
            scores = class_scores(logits, automaton)

            def solve(strip: Strip = strip, scores: npt.NDArray = scores) -> None:
                programme = Programme([strip])
                sure = np.full(len(scores), -1)
                assert len(programme.certain) == len(scores)
                assert (programme.best_classes(scores, sure) >= 0).all()

            solve()
            argmax, ours = [], []
            for _ in range(args.rounds):
                argmax.append(milliseconds(lambda logits=logits: logits.argmax(axis=1)))
                ours.append(milliseconds(solve))
            found["strips"].append(
                {
                    "form": name,
                    "states": automaton.num_states,
                    "positions": num,
                    "ms": median(ours),
                    "argmax": median(argmax),
                    "ratio": median_ratio(ours, argmax),
                }
            )
    return found


def show(figures: Figures) -> str:
    lines = [
        f"{figures['tokens']} tokens, medians of {figures['rounds']} rounds\n",
        "| form | states | positions | ms | µs a position | argmax, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['form']} | {one['states']} | {one['positions']} | {one['ms']:.2f} "
        f"| {1000 * one['ms'] / one['positions']:.1f} | {one['argmax']:.1f} "
        f"| {one['ratio']:.3f} |"
        for one in figures["strips"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
