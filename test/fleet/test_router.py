"""SGLang's router in front of two servers: of two tensor and of two data ranks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests

from benchmark.router import FLAGS, PACKAGE, Router, is_installed
from helpers.serving_harness import Server
from helpers.tiny_checkpoints import write_llada
from tools.monitoring.series import Scrape

pytestmark = pytest.mark.skipif(
    not is_installed(), reason=f"the router is not installed: pip install {PACKAGE}"
)

Found = TypeVar("Found")

PATHS = CHAT, COMPLETIONS, GENERATE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/generate",
)
MOST_RUNNING = 8
"""Canvases that a server decodes at once. More wait."""
LONGEST_END = 30
"""Seconds that a router gets to notice what a server does within a few."""


@dataclass(frozen=True)
class Ask:
    """One request, at temperature 0."""

    path: str
    text: str
    length: int
    options: Any = None

    def body(self, **more: Any) -> dict[str, Any]:
        sampling = {"ignore_eos": True, "custom_params": {"dllm": self.options or {}}}
        if self.path == GENERATE:
            sampling["max_new_tokens"] = self.length
            return {"text": self.text, "sampling_params": sampling, **more}
        message = {"role": "user", "content": self.text}
        prompt = {"messages": [message]} if self.path == CHAT else {"prompt": self.text}
        return {"model": "demo", "max_tokens": self.length, **prompt, **sampling} | more


SLOW = {"algorithm": "EntropyThreshold", "threshold": 0}
"""One token a forward."""
ASKS = [
    Ask(path, f"{text} {path}", 24, options)
    for path in (CHAT, COMPLETIONS, GENERATE)
    for text, options in (("Name a bird.", None), ("Why?", SLOW))
]


@pytest.fixture(scope="module")
def start(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """``start(*flags)``: a server of one checkpoint."""
    path = write_llada(tmp_path_factory.mktemp("llada"), n_kv_heads=2, seed=1)
    flags = (
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--served-model-name", "demo", "--enable-metrics"),
        *("--max-running-requests", str(MOST_RUNNING)),
    )
    return lambda *more: start_server(path, *flags, *more)


@pytest.fixture(scope="module")
def servers(start: Callable[..., Server]) -> list[Server]:
    """Two tensor-parallel ranks, and two data-parallel ones."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, ("--tp-size", "--dp-size"), ("2", "2")))


@pytest.fixture(scope="module")
def start_router(
    servers: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Router]]:
    """``start_router(*flags, among=servers)``: a router that knows them."""
    started: list[Router] = []

    def start(*flags: str, among: Sequence[Server] = servers) -> Router:
        log = tmp_path_factory.mktemp("router") / "log"
        started.append(Router([server.base_url for server in among], log, *flags))
        return started[-1].wait_until_ready()

    yield start
    for router in started:
        router.stop()


@pytest.fixture(scope="module")
def router(start_router: Callable[..., Router]) -> Router:
    return start_router("--policy", "round_robin")


def answered(server: Server) -> float:
    """The requests that a server has decoded, over all of its ranks."""
    server.wait_until_idle()
    lines = requests.get(f"{server.base_url}/metrics", timeout=30).text.splitlines()
    name = "sglang:dllm_canvas_length_tokens_count"
    return sum(Scrape.of(0, lines).sums(name, ()).values())


def canvases(servers: list[Server]) -> list[dict[str, Any]]:
    """The canvases that servers decode."""
    urls = [f"{server.base_url}/dllm/state" for server in servers]
    states = [requests.get(url, timeout=30) for url in urls]
    # 503, without canvases: a scheduler is too busy to tell them.
    return [c for state in states for c in state.json().get("canvases", ())]


def told(router: Router, name: str) -> list[int]:
    """A number of each rank's load, as the router knows it."""
    loads = requests.get(f"{router.base_url}/get_loads", timeout=30).json()["loads"]
    return [load[name] for load in loads]


def wait_until(get: Callable[[], Found], what: str) -> Found:
    """The first thing got that is true."""
    deadline = time.monotonic() + LONGEST_END
    while not (found := get()):
        assert time.monotonic() < deadline, f"{what}: not after {LONGEST_END} s"
        time.sleep(0.05)
    return found


def text_of(answer: dict[str, Any]) -> str:
    if "choices" not in answer:
        return str(answer["text"])
    (choice,) = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def whole(asked: Server | Router, ask: Ask) -> str:
    response = asked.post(ask.path, **ask.body())
    assert response.status_code == 200, response.text
    return text_of(response.json())


class BrokenStream(Exception):
    """A stream ended with an event that tells an error."""


def streamed(asked: Server | Router, ask: Ask, events: list[Any] | None = None) -> str:
    """The text of a stream.

    Args:
        events: gets each event as it comes.

    Raises:
        BrokenStream, requests.RequestException: the stream broke.
        AssertionError: it had another status than 200, or ended without ``[DONE]``.
    """
    events = [] if events is None else events
    url, body = asked.base_url + ask.path, ask.body(stream=True)
    with requests.post(url, json=body, stream=True, timeout=300) as response:
        assert response.status_code == 200, response.text
        for line in response.iter_lines():
            if line == b"data: [DONE]":
                break
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise BrokenStream(event)
                events.append(event)
        else:
            raise AssertionError("a stream ended as if it were complete")
    if ask.path == GENERATE:
        return str(events[-1]["text"])
    choices = [choice for event in events for choice in event["choices"]]
    parts = [choice.get("delta", choice) for choice in choices]
    name = "content" if ask.path == CHAT else "text"
    return "".join(part.get(name) or "" for part in parts)


@pytest.mark.parametrize("get", [whole, streamed])
def test_answers_are_those_of_each_server(
    router: Router, servers: list[Server], get: Callable[..., str]
) -> None:
    """Each server gets every request from the router once, in its turn."""
    wanted = [whole(servers[0], ask) for ask in ASKS]
    assert wanted == [whole(servers[1], ask) for ask in ASKS]
    assert len(set(wanted)) == len(ASKS), "options or routes make no difference"
    before = [answered(server) for server in servers]
    for _ in servers:
        assert [get(router, ask) for ask in ASKS] == wanted
    grown = [
        answered(server) - num for server, num in zip(servers, before, strict=True)
    ]
    assert grown == [len(ASKS), len(ASKS)]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_options_of_a_request_pass(
    router: Router, servers: list[Server], path: str
) -> None:
    """A router that drops unknown fields would give the default's answer."""
    canvas = {"canvas": ["AB", {"mask": 6}, "CD"]}
    filled = Ask(path, "Why?", 10, canvas)
    text = whole(router, filled)
    assert text.startswith("AB") and text.endswith("CD"), text
    for options in ({"algorithm": "LLaDA", "steps": 3}, {"cache": "dual"}, SLOW):
        ask = Ask(path, "Name a bird.", 24, {"block_size": 8, **options})
        response = router.post(path, **ask.body())
        assert text_of(response.json()) == whole(servers[0], ask)
        if path == GENERATE and "algorithm" in options:
            num_forwards = response.json()["meta_info"]["num_forwards"]
            assert num_forwards == options.get("steps", 24)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_comes_through(
    router: Router, servers: list[Server], path: str, stream: bool
) -> None:
    for bad in ({"threshold": -1}, {"no_such_option": 1}, {"algorithm": "None"}, 5):
        body = Ask(path, "Why?", 8, bad).body(stream=stream)
        routed, direct = (asked.post(path, **body) for asked in (router, servers[0]))
        assert (routed.status_code, direct.status_code) == (400, 400), routed.text
        assert routed.json() == direct.json()


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_client_that_hangs_up_frees_its_canvas(
    router: Router, servers: list[Server], path: str
) -> None:
    """Before the answer, and in the middle of a stream."""
    ask = Ask(path, "Why?", 3000, SLOW)
    url = router.base_url + path
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(requests.post, url, json=ask.body(), timeout=(5, 2))
        wait_until(lambda: len(canvases(servers)) == 1, "a canvas is decoded")
        assert isinstance(asking.exception(), requests.ReadTimeout)
    wait_until(lambda: not canvases(servers), "the canvas is freed")
    body = ask.body(stream=True)
    with requests.post(url, json=body, stream=True, timeout=60) as response:
        # The connection is closed with its iterator: keep it.
        lines = response.iter_lines()
        next(lines)
        # The first event of a chat comes before its canvas.
        (canvas,) = wait_until(lambda: canvases(servers), "a canvas is decoded")
        wait_until(
            lambda: canvas["canvas_len"] in told(router, "num_used_tokens"),
            "the router knows the tokens of the canvas",
        )
    wait_until(lambda: not canvases(servers), "the canvas is freed")
    wait_until(
        lambda: not any(told(router, "num_used_tokens")), "the router knows it too"
    )


def test_the_least_load_is_that_of_canvas_tokens(
    start_router: Callable[..., Router], servers: list[Server]
) -> None:
    """The prompts that wait have a few tokens each, and their canvases many."""
    busy, idle = servers
    router = start_router("--policy", "power_of_two")
    crowd = [Ask(GENERATE, f"{i}?", 1200, SLOW) for i in range(MOST_RUNNING + 6)]
    before = answered(idle)
    with ThreadPoolExecutor(len(crowd)) as pool:
        waiting = [pool.submit(busy.post, ask.path, **ask.body()) for ask in crowd]
        try:
            wait_until(
                lambda: max(told(router, "num_waiting_uncached_tokens")) > 6 * 1200,
                "the router knows the tokens that wait",
            )
            for ask in ASKS[:4]:
                response = router.post(ask.path, **ask.body())
                assert response.ok, response.text
                # A router counts what it has sent since its last look at a load.
                time.sleep(1.2)
            assert not any(answer.done() for answer in waiting)
        finally:
            assert busy.post("/abort_request", abort_all=True).ok
    assert answered(idle) - before == 4
    busy.wait_until_idle()


def test_a_server_dies_under_requests(router: Router, servers: list[Server]) -> None:
    """Requests that have not begun are asked again; begun streams end with an error.

    Half of the streams and half of the others are at the server that dies.
    """
    survivor, victim = servers
    asks = [Ask(path, f"{i}?", 500, SLOW) for i, path in enumerate(PATHS * 2)]
    with ThreadPoolExecutor(2 * len(asks)) as pool:
        wanted = list(pool.map(lambda ask: whole(victim, ask), asks))
        begun: list[list[Any]] = [[] for _ in asks]
        streams = [
            pool.submit(streamed, router, ask, events)
            for ask, events in zip(asks, begun, strict=True)
        ]
        wait_until(lambda: all(begun), "all streams have begun")
        others = [pool.submit(whole, router, ask) for ask in asks]
        wait_until(
            lambda: all(len(canvases([one])) == len(asks) for one in servers),
            "round_robin gives each server a half, and all are decoded",
        )
        victim.stop()
        assert [other.result() for other in others] == wanted
        errors = [stream.exception() for stream in streams]
    broken = [error for error in errors if error is not None]
    assert len(broken) == len(asks) / 2
    for error in broken:
        assert isinstance(error, (BrokenStream, requests.RequestException)), error
    for stream, error, text in zip(streams, errors, wanted, strict=True):
        assert error is not None or stream.result() == text
    wait_until(lambda: router.healthy() == [survivor.base_url], "the router notices")
    for ask in ASKS:
        assert whole(router, ask) == streamed(router, ask) == whole(survivor, ask)


def test_a_server_drains_under_requests(
    start: Callable[..., Server],
    start_router: Callable[..., Router],
    servers: list[Server],
) -> None:
    """Running requests are answered, new ones get the other server, nobody is lost.

    The last test of the servers: it ends the one that the test before has left.
    """
    leaving, staying = servers[0], start()
    router = start_router("--policy", "round_robin", among=(leaving, staying))
    ask = Ask(GENERATE, "Why?", 600, SLOW)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(get, router, ask) for get in (whole, streamed)]
        wait_until(lambda: len(canvases([leaving])) == 1, "one of them is decoded")
        leaving.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: leaving.post(GENERATE).status_code == 503, "the server drains"
        )
        wanted = [whole(staying, ask) for ask in ASKS]
        assert [whole(router, ask) for ask in ASKS] == wanted
        assert canvases([leaving]), "it runs while others are moved"
        (answer,) = {one.result() for one in running}
    assert answer == whole(staying, ask)
    assert leaving.process.wait(LONGEST_END) == 0
    wait_until(lambda: router.healthy() == [staying.base_url], "the router notices")
    assert [whole(router, ask) for ask in ASKS] == wanted


def test_the_page_about_fleets_has_the_flags() -> None:
    page = (Path(__file__).parents[2] / "docs/fleets.md").read_text("utf-8")
    command = page.split("```sh")[1].split("```")[0].replace("\\\n", " ").split()
    assert " ".join(FLAGS) in " ".join(command)
