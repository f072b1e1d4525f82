"""However a request ends, its slots come back and the others do not notice.

Every test runs on a server without and on one with prelaunch, a GPU's default.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from helpers.ended_requests import (
    Ask,
    Watcher,
    abort,
    abort_all,
    check_complete,
    check_still_well,
    one_by_one,
    random_asks,
    scrape,
    send,
    send_again,
    send_all,
)
from helpers.fault_plugin import Faults
from helpers.serving_harness import Server


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults.new(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
    faults: Faults,
) -> Server:
    """Forwards are launched before they are asked for. ``test_queue`` and ``test/soak``
    abort and pause without that, too."""
    flags = one_by_one(tmp_path_factory.mktemp("one_by_one"), prelaunch=True)
    return start_server(*flags, env=faults.env)


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


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("end", ["abort", "abort all", "close"])
def test_an_abort_counts_while_a_form_is_read(
    server: Server, faults: Faults, path: str, end: str
) -> None:
    """The request is not known to SGLang then, whose own aborts would pass it."""
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 600, "regex": "[a-z]{500}"}
    if path == "/generate":
        params = {"max_new_tokens": 600, "regex": "[a-z]{500}"}
        body = {"text": "a", "sampling_params": params}
    bodies = [{**body, "rid": f"formed-{i}", "stream": i > 0} for i in range(2)]
    name, url = "sglang:dllm_committed_tokens_total", server.base_url + path
    before = scrape(server)[name]
    with ThreadPoolExecutor(2) as pool:
        for one in bodies:
            with faults.unread_forms() as wait:
                timeout = 1 if end == "close" else 100
                asking = pool.submit(requests.post, url, json=one, timeout=timeout)
                wait()
                if end == "close":
                    assert isinstance(asking.exception(), requests.Timeout)
                elif end == "abort":
                    abort(server, one["rid"])
                else:
                    assert server.post("/abort_request", abort_all=True).ok
            if end != "close":
                assert "abort" in asking.result().text.lower()
        # A request that nobody aborts would run by then, and would soon be complete.
        # SGLang itself looks in four seconds whether the client is there.
        time.sleep(1)
        deadline = time.monotonic() + 30
        while not server.post("/flush_cache").ok:
            assert time.monotonic() < deadline, "not idle"
            time.sleep(0.2)
    assert scrape(server)[name] - before < 100
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
