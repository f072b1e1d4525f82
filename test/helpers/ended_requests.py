"""Requests that end early, by an abort or because their client hangs up, and checks
that nobody else notices."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from helpers.serving_harness import Server
from helpers.tiny_checkpoints import write_llada
from sglang_dllm.decoding.caches.registry import CACHES


@dataclass(frozen=True)
class Ask:
    """One request and how it is to end."""

    rid: str
    prompt: tuple[int, ...]
    length: int
    stream: bool = False
    end: str = "survive"  # "survive" | "abort" (by rid) | "close" (the connection)
    delay: float = 0.0
    cache: str = "none"
    is_slow: bool = False  # one token a forward

    def body(self) -> dict[str, Any]:
        slow = {"algorithm": "EntropyThreshold", "threshold": 0} if self.is_slow else {}
        dllm = {"cache": self.cache, "block_size": 16, **slow}
        return {
            "rid": self.rid,
            "input_ids": list(self.prompt),
            "stream": self.stream,
            "sampling_params": {
                "max_new_tokens": self.length,
                "temperature": 0,
                "ignore_eos": True,
                "custom_params": {"dllm": dllm},
            },
        }


def random_asks(seed: int, num: int, longest: int) -> list[Ask]:
    """A third of them ended early, a third of those by closing the connection.

    Many an id begins with another one's, and none of them may notice.
    """
    rng = random.Random(seed)
    ends = ["abort", "close", "abort", *["survive"] * 6]
    return [
        Ask(
            rid=f"{i}",
            prompt=tuple(rng.choices(range(32, 60), k=rng.randint(1, 40))),
            length=longest if i % 13 == 0 else rng.choice([8, 16, 33, 64, 100, 200]),
            stream=rng.random() < 0.5,
            end=ends[i % len(ends)],
            cache=rng.choice(["none", "none", *list(CACHES)[1:]]),
            delay=rng.random() * 3,
        )
        for i in range(num)
    ]


def send(server: Server, ask: Ask) -> dict[str, Any] | None:
    """The last answer of a request; None where we or the server hung up."""
    url = server.base_url + "/generate"
    if ask.end == "close":
        with contextlib.suppress(requests.RequestException):
            timeout = (30, ask.delay + 0.01)
            with requests.post(
                url, json=ask.body(), stream=True, timeout=timeout
            ) as response:
                deadline = time.monotonic() + ask.delay
                for _ in response.iter_lines():
                    if time.monotonic() > deadline:
                        break
        return None
    if ask.end == "abort":
        timer = threading.Timer(ask.delay, abort, (server, ask.rid))
        timer.start()
    with requests.post(url, json=ask.body(), stream=True, timeout=300) as response:
        if not ask.stream:
            return dict(response.json())
        events = [line[6:] for line in response.iter_lines() if line[:6] == b"data: "]
    assert events[-1] == b"[DONE]"
    return dict(json.loads(events[-2]))


def send_again(server: Server, ask: Ask) -> dict[str, Any]:
    """The same id is used again at once."""
    answer = send(server, replace(ask, end="survive"))
    assert answer is not None
    return answer


def abort(server: Server, rid: str) -> None:
    assert server.post("/abort_request", rid=rid).ok


def send_all(
    server: Server, asks: list[Ask]
) -> Iterator[tuple[Ask, dict[str, Any] | None]]:
    with ThreadPoolExecutor(len(asks)) as pool:
        yield from zip(asks, pool.map(lambda a: send(server, a), asks), strict=True)


def abort_all(server: Server, num: int) -> None:
    """End all requests, once so many are in the scheduler."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        load = server.load()
        if load["num_running_reqs"] + load["num_waiting_reqs"] >= num:
            break
    server.post("/abort_request", rid="", abort_all=True)


BAD_LOG_LINE = re.compile(r"memory leak|Mem Leak|double free|Traceback|SIGQUIT")


def check_complete(ask: Ask, answer: dict[str, Any] | None) -> None:
    assert answer is not None
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": ask.length}
    assert len(answer["output_ids"]) == ask.length
    assert meta["canvas_len"] == len(ask.prompt) + ask.length


def check_still_well(server: Server) -> None:
    """Idle, empty, flushable, answering, and nothing bad in the log."""
    server.wait_until_idle()
    assert server.post("/flush_cache").ok
    assert len(server.generate([65, 66], max_new_tokens=8)["output_ids"]) <= 8
    server.wait_until_idle()
    lines = server.log.read_text().splitlines()
    assert [x for x in lines if BAD_LOG_LINE.search(x)] == []


class Watcher(threading.Thread):
    """Samples the load endpoint while requests run."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.loads: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            self.loads.append(self.server.load())
            with contextlib.suppress(requests.RequestException):
                self.metrics.append(scrape(self.server))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def __enter__(self) -> Watcher:
        self.start()
        return self


def scrape(server: Server) -> dict[str, float]:
    """Prometheus samples by name, labels left out."""
    text = requests.get(f"{server.base_url}/metrics", timeout=30).text
    samples: Counter[str] = Counter()
    for name, value in re.findall(r"^(sglang:\w+).* (\S+)$", text, re.MULTILINE):
        samples[name] += float(value)
    return samples


def one_by_one(folder: Path, prelaunch: bool) -> tuple[Any, ...]:
    """The arguments of ``start_server``: a model that commits one token a step.

    It does so from left to right, and is tiny and random. A request lives for as many
    steps as it has tokens. The next position never depends on float32 noise, so crowds
    and single requests agree exactly.
    """
    file = folder / "dllm.yaml"
    text = f"{{block_size: 1, threshold: 0.0, prelaunch: {str(prelaunch).lower()}}}"
    file.write_text(text)
    return (
        write_llada(folder / "llada", seed=1),
        *("--dllm-algorithm", "EntropyThreshold"),
        *("--dllm-algorithm-config", str(file), "--enable-metrics"),
    )
