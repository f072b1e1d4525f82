"""Held-out accuracy of the demo checkpoint against its tokens per forward.

The loop of decode.py answers the problems, without a server:

    python -m tools.demo.evaluate --table FILE.md --chart FILE.png
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import Problem, heldout
from sglang_dllm.demo.tokenizer import EOS, MASK, chat_prompt
from tools.demo.checkpoint_io import load_checkpoint
from tools.demo.decode import Decoded, DecodeRule, decode

THRESHOLDS = (0.0, 0.05, 0.1, 0.3, 0.5, 0.8, 1.2, 2.0, float("inf"))


@dataclass(frozen=True)
class Score:
    """Accuracy and cost of one threshold over all problems."""

    threshold: float
    right: list[bool]
    num_tokens: int
    num_forwards: int

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / self.num_forwards


def final_value(text: str) -> int | None:
    """The number after `####` at the end of an answer, or None."""
    found = re.search(r"#### (\d+)\s*$", text)
    return int(found[1]) if found else None


def rule_for(tokenizer: Tokenizer, canvas_len: int) -> DecodeRule:
    return DecodeRule(
        mask_id=tokenizer.token_to_id(MASK),
        eos_id=tokenizer.token_to_id(EOS),
        canvas_len=canvas_len,
    )


def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    tests: Sequence[Problem],
    rule: DecodeRule,
) -> tuple[Score, list[str]]:
    """Answer all problems. The texts are in the order of the problems."""
    prompts = [tokenizer.encode(chat_prompt([("user", t.question)])).ids for t in tests]
    # There is no attention mask, so that only prompts of one length share a forward.
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    results: dict[int, Decoded] = {}
    for rows in by_length.values():
        ids = torch.tensor([prompts[row] for row in rows])
        results.update(zip(rows, decode(logits_of, ids, rule), strict=True))
    texts = [tokenizer.decode(results[row].ids) for row in range(len(tests))]
    score = Score(
        rule.threshold,
        [final_value(x) == t.value for x, t in zip(texts, tests, strict=True)],
        sum(len(r.ids) for r in results.values()),
        sum(r.num_forwards for r in results.values()),
    )
    return score, texts


def breakdown(tests: Sequence[Problem], right: Sequence[bool]) -> dict[str, str]:
    """The text `right/all` for each template and number of steps."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for problem, ok in zip(tests, right, strict=True):
        groups[f"{problem.template}/{len(problem.steps)}"].append(ok)
    return {name: f"{sum(x)}/{len(x)}" for name, x in sorted(groups.items())}


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| threshold (nats) | accuracy | tokens per forward | forwards per answer |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {s.threshold:g} | {100 * s.accuracy:.1f} % | {s.tokens_per_forward:.2f} "
        f"| {s.num_forwards / len(s.right):.1f} |"
        for s in scores
    ]
    return "\n".join(lines) + "\n"


def draw_chart(scores: Sequence[Score], path: Path) -> None:
    # Matplotlib comes with the extra `demo`. The rest of this file works without it.
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    tpf = [s.tokens_per_forward for s in scores]
    accuracy = [100 * s.accuracy for s in scores]
    axes.plot(tpf, accuracy, marker="o")
    for x, y, score in zip(tpf, accuracy, scores, strict=True):
        axes.annotate(
            f"{score.threshold:g}", (x, y), xytext=(4, 5), textcoords="offset points"
        )
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("held-out accuracy (%)")
    axes.set_ylim(bottom=0, top=104)
    axes.set_title("Demo model, labels: entropy threshold (nats)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, default=demo_path())
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--canvas-len", type=int, default=64)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()

    model, tokenizer = load_checkpoint(args.model_path)
    tests, scores = heldout(args.num, args.seed), []
    rule = rule_for(tokenizer, args.canvas_len)
    for threshold in args.thresholds:
        score, texts = evaluate(
            model, tokenizer, tests, replace(rule, threshold=threshold)
        )
        scores.append(score)
        print(table([score]).splitlines()[-1], flush=True)
        if args.show_wrong:
            print(breakdown(tests, score.right))
            for problem, text, ok in zip(tests, texts, score.right, strict=True):
                if not ok:
                    print(f"{problem.question}\n{text}\n(right: {problem.value})\n")
    if args.table:
        args.table.write_text(table(scores))
    if args.chart:
        draw_chart(scores, args.chart)


if __name__ == "__main__":
    main()
