"""Whatever ends a request, its slots come back and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from serving_harness import Server
from sglang_dllm.demo import __file__ as _demo

DEMO = Path(_demo).parent / "checkpoint"
BAD_LOG_LINE = re.compile(r"\bleak|Traceback|SIGQUIT", re.IGNORECASE)


@dataclass(frozen=True)
class Ask:
    """One request and how it is to end."""

    rid: str
    prompt: tuple[int, ...]
    length: int
    stream: bool = False
    end: str = "survive"  # "survive" | "abort" (by rid) | "close" (the connection)
    delay: float = 0.0

    def body(self) -> dict[str, Any]:
        return {
            "rid": self.rid,
            "input_ids": list(self.prompt),
            "stream": self.stream,
            "sampling_params": {
                "max_new_tokens": self.length,
                "temperature": 0,
                "ignore_eos": True,
            },
        }


def random_asks(seed: int, num: int, longest: int) -> list[Ask]:
    """A third of them ended early, a third of those by closing the connection."""
    rng = random.Random(seed)
    ends = ["abort", "close", "abort", *["survive"] * 6]
    return [
        Ask(
            rid=f"{seed}-{i:03}.",
            prompt=tuple(rng.choices(range(32, 60), k=rng.randint(1, 40))),
            length=rng.choice([8, 16, 33, 64, 100, 200, 350, longest]),
            stream=rng.random() < 0.5,
            end=ends[i % len(ends)],
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


def abort(server: Server, rid: str) -> None:
    assert server.post("/abort_request", rid=rid).ok


def send_all(
    server: Server, asks: list[Ask]
) -> Iterator[tuple[Ask, dict[str, Any] | None]]:
    with ThreadPoolExecutor(len(asks)) as pool:
        yield from zip(asks, pool.map(lambda a: send(server, a), asks), strict=True)


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
    bad = [x for x in server.log.read_text().splitlines() if BAD_LOG_LINE.search(x)]
    assert bad == []


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
    samples = re.findall(r"^(sglang:\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_64_with_a_third_aborted(demo_server: Server, seed: int) -> None:
    asks = random_asks(seed, 64, longest=700)
    with Watcher(demo_server) as watcher:
        answers = list(send_all(demo_server, asks))
    ended: list[str] = []
    for ask, answer in answers:
        if ask.end == "survive":
            check_complete(ask, answer)
        elif answer is not None:
            ended.append(answer["meta_info"]["finish_reason"]["type"])
    assert "abort" in ended, "every abort came too late to test anything"
    assert max(load["num_running_reqs"] for load in watcher.loads) > 16
    check_still_well(demo_server)
    for ask, answer in random.Random(seed).sample(answers, 24):
        if ask.end == "survive":
            assert answer is not None
            alone = send(demo_server, ask)
            assert alone is not None
            assert alone["output_ids"] == answer["output_ids"], ask


def test_an_aborted_stream_keeps_what_was_committed(demo_server: Server) -> None:
    ask = Ask("keep", (49, 43, 50), 700, stream=True, end="abort", delay=0.5)
    answer = send(demo_server, ask)
    assert answer is not None
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["completion_tokens"] == len(answer["output_ids"]) < 700
    check_still_well(demo_server)


def test_abort_all_empties_the_server(demo_server: Server) -> None:
    asks = [Ask(f"all-{i}", (40 + i % 9, 50), 600) for i in range(48)]
    timer = threading.Timer(
        1.5, lambda: demo_server.post("/abort_request", rid="", abort_all=True)
    )
    timer.start()
    answers = list(send_all(demo_server, asks))
    ended = [answer and answer["meta_info"]["finish_reason"] for _, answer in answers]
    assert sum(reason["type"] == "abort" for reason in ended if reason) >= 40
    check_still_well(demo_server)


def test_load_and_metrics_say_what_runs(demo_server: Server) -> None:
    """Canvases of one length, so that running times length is the tokens held."""
    asks = [Ask(f"load-{i}", (45, 46, 47, 48), 396) for i in range(8)]
    with Watcher(demo_server) as watcher:
        for ask, answer in send_all(demo_server, asks):
            check_complete(ask, answer)
    busy = [load for load in watcher.loads if load["num_running_reqs"]]
    assert busy, "no load was seen while requests ran"
    for load in busy:
        assert load["num_used_tokens"] == 400 * load["num_running_reqs"], load
    assert max(load["num_running_reqs"] for load in busy) == 8
    assert max(m.get("sglang:num_running_reqs", 0) for m in watcher.metrics) > 0
    assert max(m.get("sglang:num_used_tokens", 0) for m in watcher.metrics) > 0


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_and_continue(demo_server: Server, mode: str) -> None:
    """SGLang frees running requests twice on a retracting pause, if their last
    batch still holds them; and a retracted request must not repeat itself."""
    asks = [
        Ask(f"{mode}-{i}", (60 + i, 61, 62), 300 + i, stream=i % 2 == 0)
        for i in range(6)
    ]
    if mode != "abort":
        alone = [send(demo_server, ask) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(send, demo_server, ask) for ask in asks]
        time.sleep(0.5)
        assert demo_server.post("/pause_generation", mode=mode).ok
        if mode != "abort":
            paused = demo_server.load()
            time.sleep(1)
            assert not any(future.done() for future in running)
            kept = mode == "in_place"
            assert (paused["num_used_tokens"] > 0) == kept
            assert (paused["num_waiting_reqs"] == 0) == kept
        assert demo_server.post("/continue_generation").ok
        answers = [future.result() for future in running]
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        assert answer is not None
        if mode == "abort":
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        else:
            check_complete(ask, answer)
            assert answer["output_ids"] == alone[i]["output_ids"]  # type: ignore[index]
    check_still_well(demo_server)


@pytest.fixture(scope="module")
def small_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """Room for two canvases, and SGLang's own leak check after every round."""
    server = start_server(
        DEMO,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--max-total-tokens", "600", "--max-running-requests", "3"),
        env={
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
            "SGLANG_REQ_RUNNING_TIMEOUT": "20",
        },
    )
    yield server
    server.stop()


def test_a_small_pool_queues_and_finishes_all(small_server: Server) -> None:
    asks = [Ask(f"small-{i}", (50, 51 + i % 5), 198) for i in range(20)]
    with Watcher(small_server) as watcher:
        answers = list(send_all(small_server, asks))
    for ask, answer in answers:
        check_complete(ask, answer)
    assert max(load["num_used_tokens"] for load in watcher.loads) in (400, 600)
    assert max(load["num_waiting_reqs"] for load in watcher.loads) > 0
    by_prompt = {ask.prompt: answer["output_ids"] for ask, answer in answers if answer}
    for ask, answer in answers:
        assert answer is not None
        assert answer["output_ids"] == by_prompt[ask.prompt]
    check_still_well(small_server)


def test_aborts_in_a_small_pool(small_server: Server) -> None:
    asks = random_asks(9, 32, longest=500)
    for ask, answer in send_all(small_server, asks):
        if ask.end == "survive":
            check_complete(ask, answer)
    check_still_well(small_server)


def test_what_can_never_fit_is_refused(small_server: Server) -> None:
    for length in (597, 600, 700, 100_000):
        body = Ask("never", (65, 66, 67, 68), length).body()
        response = small_server.post("/generate", **body)
        assert response.status_code == 400, (length, response.text)
    check_still_well(small_server)
