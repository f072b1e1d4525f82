"""Few canvases fit, and requests wait: all end, and a full queue says when to return.

Every test runs on a server without and on one with prelaunch, a GPU's default.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from helpers.ended_requests import (
    Ask,
    Watcher,
    check_complete,
    check_still_well,
    one_by_one,
    random_asks,
    send,
    send_all,
)
from helpers.serving_harness import Server

MOST_QUEUED = 40


@pytest.fixture(scope="module", params=[False, True], ids=["", "prelaunch"])
def flags(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ...]:
    return one_by_one(tmp_path_factory.mktemp("one_by_one"), request.param)


@pytest.fixture(scope="module")
def small_server(
    start_server: Callable[..., Server], flags: tuple[Any, ...]
) -> Iterator[Server]:
    """Room for three canvases of 200, and SGLang's own leak check after every round."""
    server = start_server(
        *flags,
        *("--max-total-tokens", "600", "--max-running-requests", "3"),
        *("--max-queued-requests", str(MOST_QUEUED)),
        env={
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
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


def test_an_abort_in_the_queue_leaves_the_neighbour(small_server: Server) -> None:
    running = [Ask(f"in-{i}", (50, 51), 198) for i in range(3)]
    waiting = [Ask("job-1", (52, 53), 150, end="abort", delay=0.2)]
    waiting += [Ask(f"job-1{i}", (54, 55), 150, stream=i == 1) for i in range(2)]
    for ask, answer in send_all(small_server, [*running, *waiting]):
        if ask.end == "survive":
            check_complete(ask, answer)
        else:
            assert answer is not None
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    check_still_well(small_server)


def test_what_can_never_fit_is_refused(small_server: Server) -> None:
    for length in (597, 600, 700, 100_000):
        body = Ask("never", (65, 66, 67, 68), length).body()
        response = small_server.post("/generate", **body)
        assert response.status_code == 400, (length, response.text)
    check_still_well(small_server)


def test_a_full_queue_refuses_alike_on_every_route(small_server: Server) -> None:
    """And the load tells the tokens of the canvases that run and that wait."""
    small_server.wait_until_idle()
    labels = '{[^}]*stage="queue"'
    before = refused(small_server, labels)
    large = Ask("large", (40, 41), 590, is_slow=True)
    small = [Ask(f"small-{i}", (42, 43), 10 + i % 5) for i in range(MOST_QUEUED)]
    lens = sum(len(ask.prompt) + ask.length for ask in small)
    routes = ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses")
    routes += ("/v1/messages", "/api/chat", "/api/generate", "/v1/score")
    with ThreadPoolExecutor(1 + len(small)) as pool:
        answers = [pool.submit(send, small_server, large)]
        wait_for(small_server, num_running_reqs=1, num_waiting_reqs=0)
        answers += [pool.submit(send, small_server, ask) for ask in small]
        load = wait_for(small_server, num_running_reqs=1, num_waiting_reqs=len(small))
        assert load["num_used_tokens"] == 592
        assert load["num_waiting_uncached_tokens"] == lens
        assert load["num_total_tokens"] == load["num_active_tokens"] == 592 + lens
        for route in routes:
            for is_streamed in (False, True):
                answer = small_server.post(route, stream=is_streamed)
                assert answer.status_code == 503, (route, answer.text)
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert "queue is full" in answer.text
        assert small_server.post("/tokenize", prompt="a").status_code != 503
        found = [answer.result() for answer in answers]
    for ask, one in zip([large, *small], found, strict=True):
        check_complete(ask, one)
    assert refused(small_server, labels) == before + 2 * len(routes)
    check_still_well(small_server)


def test_retry_after_is_true(small_server: Server) -> None:
    """A client that comes back after so many seconds gets a place at once.

    It is as long as the queue in fact takes, in whole seconds. Both hold while the
    machine keeps its speed, so one of three crowds has to show them.
    """
    crowds = (crowd_and_returns(small_server) for _ in range(3))
    assert any(
        statuses == [200, 200] and all(s / 2 - 1 < t < 2 * s + 1 for t, s in told)
        for statuses, told in crowds
    )
    check_still_well(small_server)


def crowd_and_returns(server: Server) -> tuple[list[int], list[tuple[int, float]]]:
    """The statuses of two clients that come back when the server tells them.

    Beside them: the seconds that each was told, and those that the queue took.
    """
    server.wait_until_idle()
    num_done, stop = Counter[str](), threading.Event()

    def insist(ask: Ask) -> float:
        """Send one request after the other; the time of the last answer."""
        answered = 0.0
        while not stop.is_set():
            if server.post("/generate", **ask.body()).ok:
                answered = time.monotonic()
                num_done[ask.rid] += 1
            else:
                time.sleep(0.2)
        return answered

    def refusal(path: str, body: dict[str, Any]) -> tuple[float, int]:
        """When the server refused, and how long the client is to wait."""
        for _ in range(9):
            answer = server.post(path, **body)
            if answer.status_code == 503:
                return time.monotonic(), int(answer.headers["retry-after"])
        raise AssertionError("the queue is not full")

    def come_back(path: str, body: dict[str, Any], at: float, seconds: int) -> int:
        time.sleep(max(0.0, at + seconds - time.monotonic()))
        return server.post(path, **body).status_code

    message = {"role": "user", "content": "a"}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 8}),
        ("/generate", Ask("back", (40, 41), 8).body()),
    ]
    asks = [Ask(f"crowd-{i}", (40, 41), 98) for i in range(3 + MOST_QUEUED + 20)]
    with ThreadPoolExecutor(len(asks) + len(bodies)) as pool:
        crowd = [pool.submit(insist, ask) for ask in asks]
        # The server knows its speed once some canvases have ended.
        while num_done.total() < 12:
            time.sleep(0.05)
        told = [refusal(path, body) for path, body in bodies]
        stop.set()
        returning = [
            pool.submit(come_back, *body, *when)
            for body, when in zip(bodies, told, strict=True)
        ]
        last = max(one.result() for one in crowd)
        statuses = [one.result() for one in returning]
    return statuses, [(seconds, last - at) for at, seconds in told]


def refused(server: Server, labels: str) -> float:
    text = requests.get(f"{server.base_url}/metrics", timeout=30).text
    pattern = rf"^sglang:dllm_refusals_total{labels}.* (\S+)$"
    return sum(map(float, re.findall(pattern, text, re.MULTILINE)))


def wait_for(server: Server, **numbers: int) -> dict[str, Any]:
    """The load, once it has these numbers."""
    deadline = time.monotonic() + 30
    while True:
        load = server.load()
        if all(load[name] == number for name, number in numbers.items()):
            return load
        assert time.monotonic() < deadline, load
        time.sleep(0.01)
