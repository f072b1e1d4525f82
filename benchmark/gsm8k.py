"""GSM8K-style accuracy, tokens per forward and speed of a running server.

    python benchmark/gsm8k.py --base-url http://127.0.0.1:30000 --data test.jsonl

The data file has one JSON object a line with ``question`` and ``answer``, the answer
ending in ``#### N``, like GSM8K's own files.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import requests
from tqdm import tqdm

# lm-eval's gsm8k_cot_zeroshot, the form d3LLM is measured with.
PLAIN_PROMPT = "Q: {question}\nA: Let's think step by step."
PLAIN_STOPS = ["Q:", "</s>", "<|im_end|>"]

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    question: str
    target: str


@dataclass(frozen=True)
class Answer:
    """One request's outcome; tokens are the visible ones, before the first EOS."""

    text: str
    right: bool
    tokens: int
    forwards: int
    canvas_len: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    problems: int
    accuracy: float
    tokens: int
    forwards: int
    tokens_per_forward: float
    tokens_per_second: float
    median_latency: float


def last_number(text: str) -> str | None:
    """The number after ``####`` where there is one, else the last one of the text."""
    marked = text.rsplit("####", 1)[-1] if "####" in text else text
    found = _NUMBER.findall(marked) or _NUMBER.findall(text)
    if not found:
        return None
    number = found[0] if "####" in text else found[-1]
    number = number.replace("$", "").replace(",", "")
    return number.removesuffix(".0") or None


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    problems = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        target = last_number(row["answer"])
        assert target is not None, f"no answer in {line!r}"
        problems.append(Problem(row["question"], target))
    return problems


def chat_prompts(base_url: str) -> Callable[[str], str]:
    """The server's own chat template, applied to one user turn."""
    from transformers import AutoTokenizer

    info = requests.get(f"{base_url}/model_info", timeout=30).json()
    tokenizer = AutoTokenizer.from_pretrained(info["tokenizer_path"])

    def render(question: str) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        # The server's tokenizer writes the BOS itself where it writes one at all.
        if tokenizer.bos_token and tokenizer("").input_ids:
            text = text.removeprefix(tokenizer.bos_token)
        return str(text)

    return render


def ask(base_url: str, prompt: str, target: str, sampling: dict[str, Any]) -> Answer:
    began = time.perf_counter()
    response = requests.post(
        f"{base_url}/generate",
        json={"text": prompt, "sampling_params": sampling},
        timeout=600,
    )
    response.raise_for_status()
    body = response.json()
    meta = body["meta_info"]
    return Answer(
        text=body["text"],
        right=last_number(body["text"]) == target,
        tokens=meta["completion_tokens"],
        forwards=meta["num_forwards"],
        canvas_len=meta["canvas_len"],
        seconds=time.perf_counter() - began,
    )


def run(
    base_url: str,
    problems: Iterable[Problem],
    *,
    prompt: str = "chat",
    max_new_tokens: int = 256,
    concurrency: int = 8,
    progress: bool = True,
) -> tuple[Summary, list[Answer]]:
    """Ask every problem, greedily, and sum up."""
    problems = list(problems)
    render = (
        chat_prompts(base_url)
        if prompt == "chat"
        else lambda question: PLAIN_PROMPT.format(question=question)
    )
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": 0,
        "stop": None if prompt == "chat" else PLAIN_STOPS,
    }
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        waiting = pool.map(
            lambda p: ask(base_url, render(p.question), p.target, sampling), problems
        )
        answers = list(tqdm(waiting, total=len(problems), disable=not progress))
    seconds = time.perf_counter() - began
    tokens = sum(answer.tokens for answer in answers)
    forwards = sum(answer.forwards for answer in answers)
    summary = Summary(
        problems=len(answers),
        accuracy=sum(answer.right for answer in answers) / len(answers),
        tokens=tokens,
        forwards=forwards,
        tokens_per_forward=tokens / forwards,
        tokens_per_second=tokens / seconds,
        median_latency=median(answer.seconds for answer in answers),
    )
    return summary, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num", type=int, help="only the first N problems")
    parser.add_argument("--prompt", choices=["chat", "plain"], default="chat")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write summary and answers here")
    args = parser.parse_args()
    summary, answers = run(
        args.base_url,
        read_problems(args.data, args.num),
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
    )
    for name, value in asdict(summary).items():
        print(
            f"{name:<20}{value:.4g}"
            if isinstance(value, float)
            else f"{name:<20}{value}"
        )
    if args.json:
        rows = [asdict(answer) for answer in answers]
        args.json.write_text(json.dumps({**asdict(summary), "answers": rows}, indent=1))


if __name__ == "__main__":
    main()
