"""Grade-school word problems with worked answers in GSM8K's style.

A problem is a pure function of a seed. Whether it belongs to the training or the
held-out split is decided by a hash of its numbers alone, so no held-out combination
of numbers occurs in training, under any template.

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

SHE = ("Ann", "Mia", "Zoe", "Eva", "Lily", "Emma", "Nora", "Ruth", "Sara", "Julia")
HE = ("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Paul", "Noah", "Adam", "Peter")
THINGS = (
    *("apples", "pears", "eggs", "books", "coins", "cards", "pens", "stamps"),
    *("marbles", "cookies", "shells", "stickers", "flowers", "balls", "toys", "nuts"),
)
GAINS = ("buys", "finds", "gets", "wins", "collects")
LOSSES = ("loses", "sells", "gives away", "throws away", "uses up")
HOLDERS = ("boxes", "bags", "baskets", "jars", "shelves")
GOODS = (("pen", "pens"), ("toy", "toys"), ("book", "books"), ("ball", "balls"))


@dataclass(frozen=True)
class Step:
    """One line of reasoning, `left sign right`."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """The value of the step; 0, which no problem accepts, if it is not whole."""
        match self.sign:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case "x":
                return self.left * self.right
            case _:
                whole, rest = divmod(self.left, self.right)
                return 0 if rest else whole


@dataclass(frozen=True)
class Problem:
    template: str
    question: str
    numbers: tuple[int, ...]
    steps: tuple[Step, ...]
    unit: str

    @property
    def value(self) -> int:
        return self.steps[-1].result

    @property
    def answer(self) -> str:
        tail = f" {self.unit}." if self.unit else "."
        lines = [f"{s.left} {s.sign} {s.right} = {s.result}{tail}" for s in self.steps]
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


def factors(rng: random.Random) -> tuple[int, int]:
    """Two factors whose product stays in range often enough to be drawn."""
    return rng.randint(2, 9), rng.randint(2, 12)


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
    told.append(f"How many {things} does {name} have now?")
    return Problem("chain", " ".join(told), tuple(numbers), tuple(steps), things)


def compare(rng: random.Random) -> Problem:
    """One person has more, fewer or times as many as another."""
    (one, two), things = people(rng, 2), rng.choice(THINGS)
    sign, words = rng.choice(
        [
            ("+", "{} more {} than"),
            ("-", "{} fewer {} than"),
            ("x", "{} times as many as"),
        ]
    )
    a = number(rng, 30 if sign == "x" else 60)
    b = rng.randint(2, 5) if sign == "x" else number(rng, 40)
    steps = [Step(a, sign, b)]
    ask = f"does {two} have"
    if rng.random() < 0.6:
        steps.append(Step(a, "+", steps[0].result))
        ask = "do they have together"
    question = (
        f"{one} has {a} {things}. {two} has {words.format(b, things)} {one}. "
        f"How many {things} {ask}?"
    )
    return Problem("compare", question, (a, b), tuple(steps), things)


def shop(rng: random.Random) -> Problem:
    """Price times count, then the money left or the money of a second purchase."""
    (name, pronoun), (count, price) = person(rng), factors(rng)
    thing, things = rng.choice(GOODS)
    steps = [Step(count, "x", price)]
    numbers = [count, price]
    told = f"A {thing} costs {price} dollars. {name} buys {count} {things}"
    kind = rng.randrange(3)
    if kind == 0:
        question = f"{told}. How many dollars does {pronoun.lower()} pay?"
    else:
        cost = steps[0].result
        if kind == 2:
            extra = number(rng, 30)
            steps.append(Step(cost, "+", extra))
            numbers.append(extra)
            told += f" and a bag for {extra} dollars"
            cost = steps[1].result
        paid = number(rng, HIGHEST)
        steps.append(Step(paid, "-", cost))
        numbers.append(paid)
        question = f"{told}. {pronoun} had {paid} dollars. How many dollars are left?"
    return Problem("shop", question, tuple(numbers), tuple(steps), "dollars")


def groups(rng: random.Random) -> Problem:
    """Groups of equal size, then something added or taken, once or twice."""
    (name, _), things, (count, size) = person(rng), rng.choice(THINGS), factors(rng)
    steps = [Step(count, "x", size)]
    numbers = [count, size]
    told = f"{name} has {count} {rng.choice(HOLDERS)} with {size} {things} each"
    for _ in range(rng.randrange(3)):
        amount, gain = number(rng, 40), rng.random() < 0.5
        told += f" and {rng.choice(GAINS if gain else LOSSES)} {amount}"
        steps.append(Step(steps[-1].result, "+" if gain else "-", amount))
        numbers.append(amount)
    question = f"{told}. How many {things} does {name} have?"
    return Problem("groups", question, tuple(numbers), tuple(steps), things)


def two_kinds(rng: random.Random) -> Problem:
    """Two products and their sum."""
    (name, _), things = person(rng), rng.choice(THINGS)
    (a, b), (c, d) = factors(rng), factors(rng)
    one, two = rng.sample(HOLDERS, 2)
    first, second = Step(a, "x", b), Step(c, "x", d)
    question = (
        f"{name} has {a} {one} with {b} {things} each and {c} {two} with {d} {things} "
        f"each. How many {things} does {name} have?"
    )
    steps = (first, second, Step(first.result, "+", second.result))
    return Problem("two_kinds", question, (a, b, c, d), steps, things)


def share(rng: random.Random) -> Problem:
    """A store, perhaps changed before, divided evenly among friends."""
    (name, pronoun), things = person(rng), rng.choice(THINGS)
    friends = rng.randint(2, 9)
    have = friends * number(rng, HIGHEST // friends)
    numbers, steps, told = [have], list[Step](), [f"{name} has {have} {things}."]
    change = rng.randrange(3)
    if change:
        amount = number(rng, 40)
        sign = "+" if change == 1 else "-"
        start = have - amount if change == 1 else have + amount
        verb = rng.choice(GAINS if change == 1 else LOSSES)
        numbers = [start, amount]
        steps.append(Step(start, sign, amount))
        told = [f"{name} has {start} {things}.", f"{pronoun} {verb} {amount}."]
    told.append(f"{pronoun} shares them equally with {friends} friends.")
    told.append(f"How many {things} does each friend get?")
    steps.append(Step(have, "/", friends))
    return Problem("share", " ".join(told), (*numbers, friends), tuple(steps), things)


def reading(rng: random.Random) -> Problem:
    """Pages a day for some days, and the pages left of a book."""
    (name, _), (days, pages) = person(rng), factors(rng)
    total = number(rng, HIGHEST)
    read = Step(days, "x", pages)
    question = (
        f"A book has {total} pages. {name} reads {pages} pages a day for {days} days. "
        f"How many pages are left?"
    )
    steps = (read, Step(total, "-", read.result))
    return Problem("reading", question, (total, pages, days), steps, "pages")


def total(rng: random.Random) -> Problem:
    """The sum of what three people have."""
    names, things = people(rng, 3), rng.choice(THINGS)
    a, b, c = (number(rng, 45) for _ in range(3))
    first = Step(a, "+", b)
    steps = (first, Step(first.result, "+", c))
    question = (
        f"{names[0]} has {a} {things}, {names[1]} has {b} and {names[2]} has {c}. "
        f"How many {things} do they have together?"
    )
    return Problem("total", question, (a, b, c), steps, things)


def handover(rng: random.Random) -> Problem:
    """One person gives some to another; the question is about either of them."""
    (one, two), things = people(rng, 2), rng.choice(THINGS)
    a, b, c = number(rng, 80), number(rng, 60), number(rng, 40)
    left, got = Step(a, "-", c), Step(b, "+", c)
    told = f"{one} has {a} {things} and {two} has {b}. {one} gives {c} to {two}."
    kind = rng.randrange(3)
    if kind == 2:
        steps: tuple[Step, ...] = (left, got, Step(left.result, "-", got.result))
        ask = f"How many more {things} does {one} have than {two}?"
    else:
        steps = ((left, got)[kind],)
        ask = f"How many {things} does {(one, two)[kind]} have now?"
    return Problem("handover", f"{told} {ask}", (a, b, c), steps, things)


def drill(rng: random.Random) -> Problem:
    """Bare arithmetic, one or two operations from left to right."""
    sign = rng.choice("++--x/")
    a, b = (number(rng, 90), number(rng, 90)) if sign in "+-" else factors(rng)
    if sign == "/":
        a *= b
    numbers, steps = [a, b], [Step(a, sign, b)]
    text = f"{a} {sign} {b}"
    if rng.random() < 0.3:
        sign, c = rng.choice("+-"), number(rng)
        numbers.append(c)
        steps.append(Step(steps[0].result, sign, c))
        text += f" {sign} {c}"
    return Problem("drill", f"What is {text}?", tuple(numbers), tuple(steps), "")


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    *(chain, compare, shop, groups, two_kinds),
    *(share, reading, total, handover, drill),
)


def draw(rng: random.Random, split: Split, max_steps: int = 3) -> Problem:
    """The next problem of the split with at most `max_steps` steps."""
    while True:
        template = rng.choice(TEMPLATES)
        # Retried inside the template, so that a template with rare fits is not rare.
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
