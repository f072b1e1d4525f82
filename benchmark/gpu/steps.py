"""Time of one denoising step through the real server.

A request of known length is sent twice, with few and with more forwards. The difference
of their times, divided by the difference of their forwards, is the time of a step. It
has everything that the server does for a step, and nothing that it does once for a
request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import requests

from benchmark.gpu.roofline import (
    TPFS,
    ModelShape,
    Rates,
    forward_floor,
    median_of,
    step_times,
    tokens_per_second,
)
from benchmark.gpu.shapes import ROUND, Case

MIN_PAIRS, MAX_PAIRS = 5, 15

_FIRST_ID, _LAST_ID = 0, 255
"""Prompts are drawn from the bytes, which are no special tokens."""


class StepError(Exception):
    """The server did something else than a case asks for."""


@dataclass(frozen=True)
class Plan:
    """The forwards of the two runs of a case, and the number of such pairs."""

    short: int
    long: int
    pairs: int

    @classmethod
    def within(cls, case: Case, forward_s: float, budget_s: float) -> Plan:
        """The largest plan that fits: first more forwards, then more pairs, 5 at least.

        Args:
            forward_s: estimated seconds of a forward.
        """
        short, longest = case.forwards
        affordable = budget_s / MIN_PAIRS / forward_s - short
        long = min(longest, int(affordable) // ROUND * ROUND)
        long = max(long, short + ROUND)
        pairs = int(budget_s / (forward_s * (short + long)))
        return cls(short, long, min(MAX_PAIRS, max(MIN_PAIRS, pairs)))


class Requests:
    """Sends the canvases of a case in one request and checks the server's counts."""

    def __init__(self, base_url: str, deadline: Callable[[], float]) -> None:
        self.base_url = base_url
        self.session = requests.Session()
        self.left = deadline
        self.rng = random.Random(0)

    def run(self, case: Case, forwards: int) -> float:
        """Seconds until all canvases of a case are decoded."""
        prompt_len = case.context - case.answer_len
        prompts = [
            [self.rng.randint(_FIRST_ID, _LAST_ID) for _ in range(prompt_len)]
            for _ in range(case.batch)
        ]
        body = {"input_ids": prompts, "sampling_params": case.sampling(forwards)}
        began = time.perf_counter()
        answers = self.post("/generate", body).json()
        seconds = time.perf_counter() - began
        for answer in answers:
            check_counts(case, forwards, answer["meta_info"])
        return seconds

    def post(self, path: str, body: Any) -> requests.Response:
        timeout = max(10.0, self.left())
        response = self.session.post(self.base_url + path, json=body, timeout=timeout)
        if not response.ok:
            raise StepError(f"{path} answered {response.status_code}: {response.text}")
        return response


def check_counts(case: Case, forwards: int, meta: dict[str, Any]) -> None:
    """Check forwards and windows of a request.

    Raises:
        StepError: the server ran something else than the case says.
    """
    wanted = {
        "num_forwards": forwards,
        "tokens_computed": case.tokens_computed(forwards),
        "completion_tokens": case.answer_len,
    }
    found = {key: meta.get(key) for key in wanted}
    if found != wanted:
        raise StepError(f"{case.name}: expected {wanted}, the server says {found}")


def measure_case(
    server: Requests, case: Case, shape: ModelShape, rates: Rates, budget_s: float
) -> dict[str, Any]:
    """One line of the table, from pairs of runs that take turns."""
    short, _ = case.forwards
    server.run(case, short)
    guess = server.run(case, short) / short
    plan = Plan.within(case, guess, budget_s)
    needed = guess * plan.pairs * (plan.short + plan.long)
    if needed > server.left():
        raise StepError(f"it needs {needed:.0f} s, {server.left():.0f} s are left")
    server.run(case, plan.long)
    short_s, long_s = [], []
    for _ in range(plan.pairs):
        short_s.append(server.run(case, plan.short))
        long_s.append(server.run(case, plan.long))
    times = step_times(short_s, long_s, plan.short, plan.long)
    return figures(case, plan, times, shape, rates) | {
        "short_s": short_s,
        "long_s": long_s,
    }


def figures(
    case: Case, plan: Plan, times: Sequence[float], shape: ModelShape, rates: Rates
) -> dict[str, Any]:
    """One line of the table from step times in milliseconds."""
    ms = median_of(times)
    work = case.work(plan.short, plan.long)
    floor = forward_floor(shape, work, rates)
    return {
        "name": case.name,
        **asdict(case),
        **asdict(plan),
        "logits": work.logits,
        "ms": ms,
        "min_ms": min(times),
        "max_ms": max(times),
        "compute_ms": floor.compute_ms,
        "memory_ms": floor.memory_ms,
        "floor_ms": floor.ms,
        "of_floor": floor.ms / ms,
        "tps": {str(tpf): tokens_per_second(ms, tpf, case.batch) for tpf in TPFS},
    }
