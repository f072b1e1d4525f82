"""The bound of the queue: who is refused, the seconds of Retry-After, its answers."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from sglang_dllm.config.launch_flags import DEFAULT_QUEUED_PER_RUNNING, most_queued
from sglang_dllm.launching import server
from sglang_dllm.launching.doorkeeper import Doorkeeper
from sglang_dllm.launching.queue_bound import ENTRY, Load, QueueBound
from sglang_dllm.serving.routes import QUEUED

ROUTES = (
    *("/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/messages", "/api/chat", "/api/generate", "/v1/score"),
)


class Site:
    """A bound over counts that a test sets.

    Attributes:
        in_flight: requests that the tokenizer manager knows.
    """

    def __init__(self, most: int = 4) -> None:
        self.time = 100.0
        self.in_flight = 0
        self.load = Load(places=2)
        self.bound = QueueBound(
            most, lambda: self.in_flight, lambda: self.load, lambda: self.time
        )

    def fill(self, num_waiting: int, tokens: int = 0) -> None:
        """Let both places be taken, and so many requests wait."""
        self.in_flight = 2 + num_waiting
        self.load = Load(2, 2, num_waiting, tokens)

    def end(self, *num_tokens: int) -> None:
        """Let canvases end that the bound let in."""
        with self.bound.entering():
            entry = ENTRY.get()
            assert entry is not None
            for num in num_tokens:
                entry.ended(num)


def test_a_place_in_the_queue_is_a_place() -> None:
    site = Site(most=4)
    assert site.bound.refusal() is None
    site.fill(3)
    assert site.bound.refusal() is None
    site.fill(4)
    assert site.bound.refusal() is not None


def test_an_idle_server_takes_what_can_run_and_what_may_wait() -> None:
    """No scheduler has told of the burst yet."""
    site = Site(most=4)
    taken = 0
    while site.bound.refusal() is None:
        taken += 1
        site.in_flight += 1
    assert taken == 2 + 4


def test_nobody_waits_where_the_bound_is_zero() -> None:
    site = Site(most=0)
    for site.in_flight, taken in ((0, True), (1, True), (2, False)):
        assert (site.bound.refusal() is None) is taken
    site.load = Load(places=2, running=1, waiting=1)
    assert site.bound.refusal() is not None, "one waits for KV slots"


def test_requests_on_their_way_count_until_they_arrive() -> None:
    site = Site(most=1)
    site.in_flight = 2
    with site.bound.entering():
        assert site.bound.refusal() is not None
        entry = ENTRY.get()
        assert entry is not None
        entry.arrive()
        entry.arrive()
        assert site.bound.refusal() is None
    assert site.bound.refusal() is None and ENTRY.get() is None
    with pytest.raises(RuntimeError), site.bound.entering():
        raise RuntimeError("refused behind the door")
    assert site.bound.refusal() is None


def test_retry_after_is_the_time_that_the_waiting_tokens_need() -> None:
    site = Site(most=4)
    assert site.bound.refusal() is None
    site.time += 10
    site.end(300, 200)
    site.fill(4, tokens=1000)
    # 500 tokens in 10 seconds.
    assert site.bound.refusal() == 20
    site.fill(4, tokens=1001)
    assert site.bound.refusal() == 21, "rounded up"
    site.fill(4, tokens=10)
    assert site.bound.refusal() == 1
    site.fill(4, tokens=10**6)
    assert site.bound.refusal() == 60
    # The schedulers have not seen two of six: 250 tokens each, as those that ended.
    site.load, site.in_flight = Load(2, 2, 4, 500), 8
    assert site.bound.refusal() == 20
    site.time += 200
    assert site.bound.refusal() == 60, "nothing has ended for a minute"


def test_the_measured_progress_begins_when_the_server_was_idle() -> None:
    site = Site(most=4)
    assert site.bound.refusal() is None
    site.time += 5000
    site.end(1)
    site.in_flight = 0
    assert site.bound.refusal() is None
    site.time += 3.5
    site.fill(4, tokens=100)
    assert site.bound.refusal() == 4, "nothing has ended yet in 3.5 seconds"
    site.end(100)
    assert site.bound.refusal() == 4
    site.end(300)
    assert site.bound.refusal() == 1


def test_a_busy_server_that_is_never_full_keeps_a_window_of_what_ended() -> None:
    """It is never idle either, so that nothing but the time ends the measurement."""
    site = Site(most=4)
    site.fill(1)
    tracemalloc.start()
    for _ in range(20_000):
        site.time += 1
        assert site.bound.refusal() is None
        site.end(100)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 100_000


@pytest.fixture
def launch() -> Iterator[server.ServerLaunch]:
    found = server.begin()
    yield found
    server.finish()


def door(
    launch: server.ServerLaunch, site: Site, refused: list[str], answer: Any = None
) -> Doorkeeper:
    async def echo(request: Request) -> Response:
        assert ENTRY.get() is not None or request.url.path == "/tokenize"
        return PlainTextResponse(request.url.path)

    paths = (*ROUTES, "/tokenize")
    routes = [Route(path, answer or echo, methods=["POST"]) for path in paths]
    return Doorkeeper(
        Starlette(routes=routes),
        launch,
        is_up=lambda: True,
        on_startup=lambda: None,
        queue=site.bound,
        queued_paths=QUEUED,
        on_refusal=refused.append,
    )


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_refuses_with_its_form(
    launch: server.ServerLaunch, path: str
) -> None:
    site, refused = Site(most=1), list[str]()
    client = TestClient(door(launch, site, refused))
    assert client.post(path).text == path and refused == []
    site.fill(1, tokens=50)
    answer = client.post(path)
    assert answer.status_code == 503 and refused == ["queue"]
    assert int(answer.headers["retry-after"]) == 1
    body = answer.json()
    error = body if path.startswith(("/generate", "/v1/c", "/v1/sc")) else body["error"]
    text = error if isinstance(error, str) else error["message"]
    assert "queue is full" in text
    assert client.post("/tokenize").status_code == 200, "it needs no canvas"
    launch.started()
    launch.on_signal(15)
    answer = client.post(path)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert refused == ["queue", "drain"]


def test_openais_client_comes_back_by_itself(
    launch: server.ServerLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, refused, slept = Site(most=1), list[str](), list[float]()
    completion = {"id": "1", "object": "text_completion", "created": 1, "model": "m"}
    completion |= {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}

    async def answer(_: Request) -> Response:
        return JSONResponse(completion)

    assert site.bound.refusal() is None
    site.time += 7
    site.end(100)
    site.fill(1, tokens=100)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        site.in_flight = 0

    monkeypatch.setattr("openai._base_client.time.sleep", sleep)
    asked = TestClient(door(launch, site, refused, answer))

    def send(request: httpx.Request) -> httpx.Response:
        found = asked.post(request.url.path)
        return httpx.Response(found.status_code, headers=found.headers, text=found.text)

    http = httpx.Client(transport=httpx.MockTransport(send))
    client = OpenAI(base_url="http://testserver/v1", api_key="x", http_client=http)
    assert client.completions.create(model="m", prompt="a").choices[0].text == "x"
    assert slept == [7] and refused == ["queue"]


def test_the_way_in_ends_where_the_client_goes(launch: server.ServerLaunch) -> None:
    site = Site(most=1)

    async def answer(_: Request) -> Response:
        raise asyncio.CancelledError

    keeper = door(launch, site, [], answer)
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}

    async def ask() -> None:
        await keeper({**scope, "query_string": b""}, None, None)  # type: ignore[arg-type]

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask())
    site.in_flight = 2
    assert site.bound.refusal() is None


def test_the_bound_that_a_launch_gives() -> None:
    class Flags:
        max_queued_requests: int | None = None
        max_running_requests = 8
        dp_size = 2

    assert most_queued(Flags) == DEFAULT_QUEUED_PER_RUNNING * 8 * 2
    Flags.max_queued_requests = 3
    assert most_queued(Flags) == 6
