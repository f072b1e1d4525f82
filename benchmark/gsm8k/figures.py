"""The figures of a run: intervals, tokens by each project's count, AUP."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from benchmark.gsm8k.problems import cut_at_stops

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Answer:
    """The judged answer of one request.

    Attributes:
        tokens: visible ones, before the first EOS.
        began: Unix time in seconds.
        counts: tokens by each way of counting that the server's facts allow.
    """

    index: int
    text: str
    right: bool
    tokens: int
    forwards: int | None
    canvas_len: int | None
    began: float
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    warmup: bool = False


@dataclass(frozen=True)
class Way:
    """The way in which one project counts.

    Attributes:
        count: a key of ``Answer.counts``.
        clock: "wall" is the time in which at least one request ran. "request" is the
            sum of the requests' own times, the project's generate time at
            concurrency 1.
    """

    count: str
    clock: str
    note: str


WAYS = {
    "ours": Way("visible", "wall", "before the first EOS"),
    "d3LLM LLaDA": Way("until_retokenised", "request", "stop-cut text, no EOS"),
    "d3LLM Dream": Way("eos_until_retokenised", "request", "to EOS, then stop-cut"),
    "Fast-dLLM LLaDA": Way("until_retokenised", "wall", "stop-cut text, no EOS"),
    "Fast-dLLM Dream": Way("not_eos", "wall", "all ids but EOS"),
    "dInfer": Way("not_eos", "request", "all ids but EOS"),
    "D2F": Way("eos_until_retokenised", "request", "stop-cut text"),
    "APD": Way("visible", "request", "before the first EOS"),
    "dlmserve": Way("canvas", "request", "the whole canvas"),
}


def count_tokens(
    *,
    visible: int,
    canvas: int,
    ids: Sequence[int] | None,
    text: str,
    stops: Sequence[str],
    eos_id: int | None,
    encode: Callable[[str], Sequence[int]] | None,
    decode: Callable[[Sequence[int]], str] | None,
) -> dict[str, int]:
    """Every count that the given facts allow.

    The published harnesses tokenise text with its special tokens again. Counts of the
    text therefore decode the ids, if the server tells them.
    """
    counts = {"visible": visible, "canvas": canvas}
    if ids is not None and eos_id is not None:
        counts["not_eos"] = sum(i != eos_id for i in ids)
    if encode is None:
        return counts
    whole = until_eos = text
    if ids is not None and decode is not None:
        whole = until_eos = decode(ids)
        if eos_id is not None and eos_id in ids:
            until_eos = decode(ids[: list(ids).index(eos_id)])

    def tokens(of: str) -> int:
        return sum(i != eos_id for i in encode(cut_at_stops(of, stops)))

    counts["until_retokenised"] = tokens(whole)
    counts["eos_until_retokenised"] = tokens(until_eos)
    return counts


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of the share ``right / total``."""
    share = right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def percentile(values: Collection[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy's default is."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def busy_seconds(spans: Collection[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) spans. Idle time does not count."""
    busy, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def aup(points: Collection[tuple[float, float]], best: float | None = None) -> float:
    """d3LLM's accuracy under parallelism (arXiv 2601.07568).

    Args:
        points: (TPF, accuracy in %).
        best: the best accuracy of any method on the task. Without it the points' own
            best is taken, and areas compare within one sweep only.
    """
    ordered = sorted(points)
    floor = ordered[0][1] - 5
    ordered = [point for point in ordered if point[1] >= floor]
    best = max([y for _, y in ordered] + ([] if best is None else [best]))

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0) if best else 0.0

    area = ordered[0][0] * ordered[0][1]
    for (left, low), (right, high) in pairwise(ordered):
        area += 0.5 * (right - left) * (weighted(low) + weighted(high))
    return area


@dataclass(frozen=True)
class Rate:
    """One row of the token table. None stands for an unknown count."""

    tokens: int | None
    tokens_per_forward: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Summary:
    """Accuracy over all answers. Tokens, forwards and times leave the warm-up out."""

    problems: int
    right: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    timed: int
    tokens: int
    canvas_tokens: int
    forwards: int | None
    tokens_per_forward: float | None
    tokens_per_second: float
    seconds: float
    latency_p50: float
    latency_p90: float
    latency_p99: float
    rates: dict[str, Rate]


def summarise(answers: Sequence[Answer]) -> Summary:
    """The figures of all answers of a run."""
    timed = [answer for answer in answers if not answer.warmup]
    steps = [answer.forwards for answer in timed]
    # The server is not ours if an answer has no forwards.
    known: list[int] = [step for step in steps if step is not None]
    complete = len(known) == len(steps) and sum(known) > 0
    forwards = sum(known) if complete else None
    wall = busy_seconds([(a.began, a.began + a.seconds) for a in timed])
    clocks = {"wall": wall, "request": sum(a.seconds for a in timed)}

    def rate(way: Way) -> Rate:
        if any(way.count not in a.counts for a in timed):
            return Rate(None, None, None)
        tokens = sum(a.counts[way.count] for a in timed)
        per_forward = None if forwards is None else tokens / forwards
        return Rate(tokens, per_forward, tokens / clocks[way.clock])

    rates = {name: rate(way) for name, way in WAYS.items()}
    right = sum(answer.right for answer in answers)
    low, high = wilson(right, len(answers))
    latencies = [answer.seconds for answer in timed]
    tokens = sum(answer.tokens for answer in timed)
    return Summary(
        problems=len(answers),
        right=right,
        accuracy=right / len(answers),
        accuracy_low=low,
        accuracy_high=high,
        timed=len(timed),
        tokens=tokens,
        canvas_tokens=sum(a.counts.get("canvas", 0) for a in timed),
        forwards=forwards,
        tokens_per_forward=None if forwards is None else tokens / forwards,
        tokens_per_second=tokens / wall,
        seconds=wall,
        latency_p50=percentile(latencies, 0.5),
        latency_p90=percentile(latencies, 0.9),
        latency_p99=percentile(latencies, 0.99),
        rates=rates,
    )
