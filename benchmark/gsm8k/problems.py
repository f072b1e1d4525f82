"""Problems, prompts and the number in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.command import BenchmarkError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str

    @property
    def target(self) -> str:
        number = last_number(self.answer)
        assert number is not None  # checked where the problem was read
        return number


@dataclass(frozen=True)
class PromptForm:
    """One way to ask: turns of a chat, or raw text with stop strings.

    Attributes:
        joint: the text between the question and the answer of a worked example.
    """

    question: str
    joint: str
    chat: bool
    stops: tuple[str, ...]


# lm-eval's gsm8k_cot_zeroshot: raw for d3LLM-LLaDA, one user turn for d3LLM-Dream.
_COT = "Q: {question}\nA: Let's think step by step."
_COT_STOPS = ("Q:", "</s>", "<|im_end|>")

PROMPT_FORMS = {
    "chat": PromptForm("{question}", "", chat=True, stops=()),
    "plain": PromptForm(_COT, " ", chat=False, stops=_COT_STOPS),
    "plain-chat": PromptForm(_COT, " ", chat=True, stops=_COT_STOPS),
    # lm-eval's gsm8k, the few-shot form of Fast-dLLM.
    "qa": PromptForm(
        "Question: {question}\nAnswer:",
        " ",
        chat=False,
        stops=("Question:", "</s>", "<|im_end|>"),
    ),
}

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def last_number(text: str) -> str | None:
    """The number after ``####``, or the last number of a text without that mark."""
    marked = text.rsplit("####", 1)[-1] if "####" in text else text
    found = _NUMBER.findall(marked) or _NUMBER.findall(text)
    if not found:
        return None
    number = found[0] if "####" in text else found[-1]
    return _plain_number(number)


def flexible_number(text: str) -> str | None:
    """The last number by lm-eval's ``flexible-extract``."""
    found = _FLEXIBLE.findall(text)
    return _plain_number("".join(found[-1])) if found else None


def _plain_number(number: str) -> str | None:
    number = number.replace("$", "").replace(",", "").removesuffix(".")
    whole, _, fraction = number.partition(".")
    if not any(map(str.isdigit, number)):
        return None
    return number if fraction.strip("0") else whole


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "last": last_number,
    "flexible": flexible_number,
}


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Read a JSONL file of ``question`` and ``answer``, like GSM8K's own.

    Raises:
        BenchmarkError: names the file and the line.
    """
    try:
        # splitlines() would also cut at line ends that JSON keeps inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"cannot read {path}: {error}") from None
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(problems) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = Problem(row["question"], row["answer"])
            if last_number(problem.answer) is None or not problem.question.strip():
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BenchmarkError(
                f'{path} line {number}: expected an object with "question" and '
                '"answer", the answer with a number'
            ) from None
        problems.append(problem)
    if not problems:
        raise BenchmarkError(f"{path} has no problems")
    return problems


def build_prompt(
    form: PromptForm, shots: Sequence[Problem], question: str
) -> str | Messages:
    """The raw text or the turns of a chat, with the worked examples first."""
    ask = form.question.format
    if form.chat and not form.joint:
        turns = []
        for shot in shots:
            turns += [
                {"role": "user", "content": ask(question=shot.question)},
                {"role": "assistant", "content": shot.answer},
            ]
        return [*turns, {"role": "user", "content": ask(question=question)}]
    examples = [ask(question=s.question) + form.joint + s.answer for s in shots]
    text = "\n\n".join([*examples, ask(question=question)])
    return [{"role": "user", "content": text}] if form.chat else text


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop string."""
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]
