"""The cost of each rule of the answer's length, for caps that are too long.

    python -m benchmark.lengths --json OUT.json

Held-out problems of the demo model run through the real engine in this process. Every
rule answers them with each cap, or with the rest of the context where that is less. A
fixed canvas of the right size is the row that the others are divided by. Tokens are
computed positions of the canvas, summed over forwards.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.gsm8k.problems import last_number
from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import Problem, heldout

CAPS = (64, 256, 1024)
RULES: tuple[dict[str, Any], ...] = (
    {"length": "fixed"},
    {"length": "append"},
    {"length": "append", "append_blocks": 2},
    {"length": "rho_eos"},
    {"length": "rho_eos", "length_step": 1},
    {"length": "daedal"},
)
AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """One rule and cap: its means for an answer.

    Attributes:
        rule: the keys of the request.
        right: share of right answers.
        seconds: of an answer, ``AT_ONCE`` at a time.
    """

    rule: dict[str, Any]
    cap: int
    right: float
    forwards: float
    tokens: float
    final_length: float
    seconds: float


class Asker:
    """The demo model and its problems."""

    def __init__(self, num: int, seed: int, algorithm: str, options: dict[str, Any]):
        from transformers import AutoTokenizer

        from benchmark.in_process import InProcess

        path = str(demo_path())
        self.engine = InProcess(path, "--max-total-tokens", str(AT_ONCE * 1280))
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.problems = heldout(num, seed)
        self.algorithm, self.options = algorithm, options

    def row(self, rule: dict[str, Any], cap: int, num: int) -> Row:
        began, found = time.perf_counter(), []
        waiting = self.problems[:num]
        active: list[tuple[Problem, Any]] = []
        while waiting or active:
            while waiting and len(active) < AT_ONCE:
                try:
                    canvas = self._add(waiting[-1], rule, cap)
                except ValueError:
                    break  # a canvas that grows comes first; the next round lets it
                active.append((waiting.pop(), canvas))
            assert active, "no canvas fits"
            self.engine.run_round()
            running = {id(r.dllm_algo_state.canvas) for r in self.engine.requests}
            found += [pair for pair in active if id(pair[1]) not in running]
            active = [pair for pair in active if id(pair[1]) in running]
        seconds, num = time.perf_counter() - began, len(found)
        return Row(
            rule,
            cap,
            sum(map(self._is_right, found)) / num,
            sum(canvas.num_forwards for _, canvas in found) / num,
            sum(canvas.tokens_computed for _, canvas in found) / num,
            sum(len(canvas) - canvas.answer_start for _, canvas in found) / num,
            seconds / num,
        )

    def _add(self, problem: Problem, rule: dict[str, Any], cap: int) -> Any:
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        options = {**self.options, **rule}
        cap = min(cap, self.engine.max_req_len - len(prompt))
        return self.engine.add(prompt, cap, self.algorithm, options)

    def _is_right(self, pair: tuple[Problem, Any]) -> bool:
        problem, canvas = pair
        ids = canvas.ids[canvas.answer_start :].tolist()
        ends = [i for i, token in enumerate(ids) if token in canvas.eos_ids]
        text = self.tokenizer.decode(ids[: min(ends, default=len(ids))])
        _, _, behind = text.rpartition("####")
        return last_number(behind) == str(problem.value)


def table(rows: Sequence[Row], right_size: Row) -> str:
    """The rows as Markdown, with ratios to the fixed canvas of the right size."""
    lines = [
        "| rule | cap | right | length at the end | forwards | tokens computed "
        "| tokens, ratio | seconds, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rule = " ".join(str(value) for value in row.rule.values())
        lines.append(
            f"| {rule} | {row.cap} | {row.right:.1%} | {row.final_length:.0f} "
            f"| {row.forwards:.1f} | {row.tokens:.0f} "
            f"| {row.tokens / right_size.tokens:.2f} "
            f"| {row.seconds / right_size.seconds:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=200, help="problems")
    parser.add_argument("--num-fixed", type=int, default=16, help="of fixed canvases")
    parser.add_argument("--seed", type=int, default=7, help="of the problems")
    parser.add_argument(
        "--right-size", type=int, default=64, help="of the fixed canvas"
    )
    parser.add_argument("--algorithm", default="FullAttnMultiBlock")
    parser.add_argument("--options", type=json.loads, default={}, help="its keys, JSON")
    parser.add_argument("--caps", type=int, nargs="+", default=list(CAPS))
    parser.add_argument("--rules", type=json.loads, default=RULES, help="a JSON list")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    asker = Asker(args.num, args.seed, args.algorithm, args.options)
    fixed = {"length": "fixed"}
    asker.row(fixed, args.right_size, AT_ONCE)  # the first forwards are slow
    right_size = asker.row(fixed, args.right_size, args.num)
    rows = [right_size]
    for cap in args.caps:
        for rule in args.rules:
            # Long fixed canvases take long; few of them show what they cost.
            num = args.num_fixed if rule == fixed else args.num
            rows.append(asker.row(rule, cap, num))
            print(table(rows[-1:], right_size).splitlines()[-1], flush=True)
    print(table(rows, right_size))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
