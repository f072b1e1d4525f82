"""Grade-school word problems with worked answers in GSM8K's style.

A problem is a pure function of a seed. A hash of its numbers alone decides whether it
is for training or held out, so that no held-out combination of numbers occurs in
training, under any template.

    python -m sglang_dllm.demo.problems --seed 7 --num 200 --split heldout > FILE
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Split = Literal["train", "heldout"]

LOWEST, HIGHEST = 2, 99
HELDOUT_SHARE = 10

SHE = ("Ann", "Mia", "Eva", "Sara")
HE = ("Tom", "Ben", "Sam", "Paul")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens")
GAINS = ("buys", "finds", "gets")
LOSSES = ("loses", "sells", "gives away")


@dataclass(frozen=True)
class Step:
    """One line of reasoning, `left sign right`."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right


@dataclass(frozen=True)
class Problem:
    template: str
    question: str
    numbers: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def value(self) -> int:
        return self.steps[-1].result

    @property
    def answer(self) -> str:
        lines = [f"{s.left} {s.sign} {s.right} = {s.result}" for s in self.steps]
        return "\n".join([*lines, f"#### {self.value}"])

    @property
    def split(self) -> Split:
        key = "-".join(map(str, sorted(self.numbers)))
        return "train" if zlib.crc32(key.encode()) % HELDOUT_SHARE else "heldout"

    @property
    def in_range(self) -> bool:
        values = [n for s in self.steps for n in (s.left, s.right, s.result)]
        return all(LOWEST <= n <= HIGHEST for n in [*values, *self.numbers])


def person(rng: random.Random) -> tuple[str, str]:
    """A name and its pronoun."""
    if rng.random() < 0.5:
        return rng.choice(SHE), "She"
    return rng.choice(HE), "He"


def people(rng: random.Random, count: int) -> list[str]:
    return rng.sample(SHE + HE, count)


def number(rng: random.Random, high: int = 60) -> int:
    return rng.randint(LOWEST, high)


def chain(rng: random.Random) -> Problem:
    """A store of things that grows and shrinks one to three times."""
    (name, pronoun), things = person(rng), rng.choice(THINGS)
    have = number(rng, 80)
    numbers, steps, told = [have], list[Step](), [f"{name} has {have} {things}."]
    for _ in range(rng.randint(1, 3)):
        amount, gain = number(rng), rng.random() < 0.5
        verb = rng.choice(GAINS if gain else LOSSES)
        told.append(f"{pronoun} {verb} {amount}{' more' if gain else ''}.")
        steps.append(Step(have, "+" if gain else "-", amount))
        numbers.append(amount)
        have = steps[-1].result
    told.append(f"How many {things} does {name} have?")
    return Problem("chain", " ".join(told), tuple(numbers), tuple(steps))


def compare(rng: random.Random) -> Problem:
    """One person has more or fewer than another."""
    (one, two), things = people(rng, 2), rng.choice(THINGS)
    sign, words = rng.choice([("+", "more"), ("-", "fewer")])
    a, b = number(rng), number(rng, 40)
    steps = [Step(a, sign, b)]
    ask = f"does {two} have"
    if rng.random() < 0.5:
        steps.append(Step(a, "+", steps[0].result))
        ask = "do they have"
    question = (
        f"{one} has {a} {things}. {two} has {b} {words} than {one}. "
        f"How many {things} {ask}?"
    )
    return Problem("compare", question, (a, b), tuple(steps))


def total(rng: random.Random) -> Problem:
    """The sum of the things of two or three people."""
    names, things = people(rng, rng.randint(2, 3)), rng.choice(THINGS)
    amounts = [number(rng, 45) for _ in names]
    steps = [Step(amounts[0], "+", amounts[1])]
    told = [f"{names[0]} has {amounts[0]} {things}."]
    told += [f"{n} has {a}." for n, a in zip(names[1:], amounts[1:], strict=True)]
    steps += [Step(steps[0].result, "+", amount) for amount in amounts[2:]]
    told.append(f"How many {things} do they have?")
    return Problem("total", " ".join(told), tuple(amounts), tuple(steps))


def handover(rng: random.Random) -> Problem:
    """One person gives some to another; the question is about either of them."""
    (one, two), things = people(rng, 2), rng.choice(THINGS)
    a, b, c = number(rng, 80), number(rng), number(rng, 40)
    left, got = Step(a, "-", c), Step(b, "+", c)
    asked = rng.randrange(2)
    question = (
        f"{one} has {a} {things}. {two} has {b}. {one} gives {c} to {two}. "
        f"How many {things} does {(one, two)[asked]} have?"
    )
    return Problem("handover", question, (a, b, c), ((left, got)[asked],))


def drill(rng: random.Random) -> Problem:
    """Bare arithmetic, one to three operations from left to right."""
    have = number(rng, 90)
    numbers, steps, text = [have], list[Step](), f"{have}"
    for _ in range(rng.randint(1, 3)):
        sign, amount = rng.choice("+-"), number(rng)
        steps.append(Step(have, sign, amount))
        numbers.append(amount)
        text += f" {sign} {amount}"
        have = steps[-1].result
    return Problem("drill", f"What is {text}?", tuple(numbers), tuple(steps))


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    *(chain, chain, compare, total, handover, drill),
)


def draw(
    rng: random.Random,
    split: Split,
    max_steps: int = 3,
    templates: tuple[Callable[[random.Random], Problem], ...] = TEMPLATES,
) -> Problem:
    """The next problem of the split with at most `max_steps` steps."""
    while True:
        template = rng.choice(templates)
        # A template whose draws seldom fit is tried again, so that it stays as frequent
        # as the others.
        for _ in range(200):
            problem = template(rng)
            if (
                problem.in_range
                and problem.split == split
                and len(problem.steps) <= max_steps
            ):
                return problem


def problems(seed: int, split: Split, max_steps: int = 3) -> Iterator[Problem]:
    """An endless stream of problems; the same seed gives the same stream."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield draw(rng, split, max_steps)


def heldout(num: int, seed: int = 7) -> list[Problem]:
    """The first held-out problems of a seed."""
    return list(islice(problems(seed, "heldout"), num))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--split", choices=["train", "heldout"], default="heldout")
    args = parser.parse_args()
    for problem in islice(problems(args.seed, args.split), args.num):
        print(json.dumps({"question": problem.question, "answer": problem.answer}))


if __name__ == "__main__":
    main()
