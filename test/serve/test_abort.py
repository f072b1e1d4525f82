"""However a request ends, its slots come back and the others do not notice.

Every test runs on a server without and on one with prelaunch, a GPU's default.
"""

from __future__ import annotations

import contextlib
import json
import random
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
    abort,
    abort_all,
    random_asks,
    send,
    send_again,
    send_all,
)
from helpers.serving_harness import Server
from helpers.tiny_checkpoints import write_llada

MOST_QUEUED = 40
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


@pytest.fixture(scope="module", params=[False, True], ids=["", "prelaunch"])
def flags(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ...]:
    """A tiny random model that commits one token a step, from left to right.

    A request lives for as many steps as it has tokens. The next position never depends
    on float32 noise, so crowds and single requests agree exactly.
    """
    root = tmp_path_factory.mktemp("one_by_one")
    prelaunch = str(request.param).lower()
    (root / "dllm.yaml").write_text(
        f"{{block_size: 1, threshold: 0.0, prelaunch: {prelaunch}}}"
    )
    return (
        write_llada(root / "llada", seed=1),
        *("--dllm-algorithm", "EntropyThreshold"),
        *("--dllm-algorithm-config", str(root / "dllm.yaml"), "--enable-metrics"),
    )


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Server], flags: tuple[Any, ...]
) -> Iterator[Server]:
    started = start_server(*flags)
    yield started
    started.stop()


def test_a_storm_of_64_with_a_third_aborted(server: Server) -> None:
    seed = 1
    asks = random_asks(seed, 64, longest=700)
    with Watcher(server) as watcher:
        answers = list(send_all(server, asks))
    ended: list[str] = []
    for ask, answer in answers:
        if ask.end == "survive":
            check_complete(ask, answer)
        elif answer is not None:
            ended.append(answer["meta_info"]["finish_reason"]["type"])
    assert "abort" in ended, "every abort came too late to test anything"
    assert max(load["num_running_reqs"] for load in watcher.loads) > 16
    for name in ("sglang:num_running_reqs", "sglang:num_used_tokens"):
        assert max(sample.get(name, 0) for sample in watcher.metrics) > 0, name
    check_still_well(server)
    for ask, answer in random.Random(seed).sample(answers, 16):
        if ask.end == "survive" and ask.length <= 200:
            assert answer is not None
            alone = send_again(server, ask)
            assert alone["output_ids"] == answer["output_ids"], ask


def test_an_aborted_stream_keeps_what_was_committed(server: Server) -> None:
    ask = Ask(
        "keep", (49, 43, 50), 700, stream=True, end="abort", delay=0.5, is_slow=True
    )
    answer = send(server, ask)
    assert answer is not None
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["completion_tokens"] == len(answer["output_ids"]) < 700
    check_still_well(server)


def test_a_stream_never_splits_a_character(server: Server) -> None:
    """The tokens of this model are bytes. Drawn at random, some make a character."""
    params = {"max_new_tokens": 400, "temperature": 2.0, "sampling_seed": 1}
    body = {
        "input_ids": [65],
        "sampling_params": params | {"ignore_eos": True},
        "stream": True,
    }
    with requests.post(
        f"{server.base_url}/generate", json=body, stream=True, timeout=300
    ) as response:
        lines = [x[6:] for x in response.iter_lines() if x.startswith(b"data: {")]
    texts = [json.loads(line)["text"] for line in lines]
    assert any(len(char.encode()) > 1 for char in texts[-1].replace("\ufffd", ""))
    for text in texts:
        assert texts[-1].startswith(text)
    whole = server.post("/generate", **body | {"stream": False}).json()
    assert whole["text"] == texts[-1]


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_request_whose_id_begins_like_an_ended_one_finishes(
    server: Server, end: str
) -> None:
    asks = [
        Ask("job-1", (40, 41), 700, stream=True, end=end, delay=0.3, is_slow=True),
        Ask("job-10", (42, 43), 300),
        Ask("job-1-b", (44, 45), 300, stream=True),
    ]
    (_, first), *others = send_all(server, asks)
    if first is not None:
        assert first["meta_info"]["finish_reason"]["type"] == "abort"
    for ask, answer in others:
        check_complete(ask, answer)
        assert answer is not None and answer["meta_info"]["id"] == ask.rid
    again = Ask("job-1", (40, 41), 300, stream=True)
    for _ in range(2):
        check_complete(again, send_again(server, again))
    check_still_well(server)


def test_an_abort_ends_all_copies(server: Server) -> None:
    ask = Ask("many", (46, 47), 700, end="abort", delay=0.3, is_slow=True)
    body = ask.body()
    body["sampling_params"]["n"] = 3
    timer = threading.Timer(ask.delay, abort, (server, "many"))
    timer.start()
    answers = server.post("/generate", **body).json()
    metas = [answer["meta_info"] for answer in answers]
    assert [meta["id"] for meta in metas] == ["many_0", "many_1", "many_2"]
    assert {meta["finish_reason"]["type"] for meta in metas} == {"abort"}
    check_still_well(server)


def test_abort_all_empties_the_server(server: Server) -> None:
    asks = [Ask(f"all-{i}", (40 + i % 9, 50), 600, is_slow=True) for i in range(48)]
    aborting = threading.Thread(target=abort_all, args=(server, len(asks)))
    aborting.start()
    answers = [answer for _, answer in send_all(server, asks)]
    aborting.join()
    ended = [
        answer["meta_info"]["finish_reason"]["type"] for answer in answers if answer
    ]
    assert ended == ["abort"] * len(asks)
    check_still_well(server)


def test_the_load_endpoint_says_what_runs(server: Server) -> None:
    """All canvases have one length, so the tokens held are a multiple of it."""
    asks = [Ask(f"load-{i}", (45, 46, 47, 48), 196) for i in range(8)]
    with Watcher(server) as watcher:
        for ask, answer in send_all(server, asks):
            check_complete(ask, answer)
    busy = [load for load in watcher.loads if load["num_running_reqs"]]
    assert busy, "no load was seen while requests ran"
    for load in busy:
        assert load["num_used_tokens"] == 200 * load["num_running_reqs"], load
    assert max(load["num_running_reqs"] for load in busy) == 8


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_and_continue(server: Server, mode: str) -> None:
    """A retracting pause frees running requests twice if the last batch still holds
    them. A retracted request must not repeat itself."""
    asks = [
        Ask(f"{mode}-{i}", (60 + i, 61, 62), 400 + i, stream=i % 2 == 0)
        for i in range(4)
    ]
    alone = [send_again(server, ask) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(send, server, ask) for ask in asks]
        time.sleep(0.5)
        assert server.post("/pause_generation", mode=mode).ok
        time.sleep(2)
        finished = [future.done() for future in running]
        assert server.post("/continue_generation").ok
        answers = [future.result() for future in running]
    assert all(finished) == (mode == "abort"), "the pause came too late"
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        assert answer is not None
        if mode == "abort":
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        else:
            check_complete(ask, answer)
            assert answer["output_ids"] == alone[i]["output_ids"], (ask, i)
    check_still_well(server)


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
