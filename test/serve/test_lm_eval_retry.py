"""lm-eval's model class asks again while a server's queue is full."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from helpers.http_stub import StubHandler, StubServer
from sglang_dllm.lm_eval_model import ServerLM


class FullServer(StubServer):
    """Answers 503 so many times, and then a score."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__(_Handler)
        self.num_refusals = num_refusals
        self.asked: list[tuple[float, Any]] = []


class _Handler(StubHandler):
    server: FullServer

    def do_POST(self) -> None:
        self.server.asked.append((time.monotonic(), self.body()))
        if len(self.server.asked) <= self.server.num_refusals:
            self.reply(503, {"message": "full"}, Retry_After="1")
        else:
            found = {"scores": [-1.5], "num_forwards": [1], "is_greedy": None}
            self.reply(200, found)


@pytest.fixture
def full_server(request: pytest.FixtureRequest) -> Iterator[FullServer]:
    with FullServer(request.param) as server:
        yield server


def scored(server: FullServer, **options: Any) -> list[tuple[float, bool]]:
    model = ServerLM(base_url=server.base_url, **options)
    instance = Instance("loglikelihood", {}, ("1 + 1 =", " 2"), 0)
    return model.loglikelihood([instance])


@pytest.mark.parametrize("full_server", [1], indirect=True)
def test_a_full_queue_is_asked_again_when_it_says(full_server: FullServer) -> None:
    assert scored(full_server) == [(-1.5, False)]
    (first, body), (second, again) = full_server.asked
    assert body == again and body["items"] == [" 2"]
    assert second - first >= 0.9, "Retry-After is a second"


@pytest.mark.parametrize("full_server", [9], indirect=True)
def test_a_queue_that_stays_full_is_an_error(full_server: FullServer) -> None:
    with pytest.raises(RuntimeError, match=r"/v1/score: 503 .*full"):
        scored(full_server, max_retries=1)
    assert len(full_server.asked) == 2
