"""lm-eval's model class asks again while a server's queue is full."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from sglang_dllm.lm_eval_model import ServerLM


class FullServer(ThreadingHTTPServer):
    """Answers 503 so many times, and then a score."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_refusals = num_refusals
        self.asked: list[tuple[float, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: FullServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((time.monotonic(), body))
        is_full = len(self.server.asked) <= self.server.num_refusals
        found = {"scores": [-1.5], "num_forwards": [1], "is_greedy": None}
        answer = json.dumps({"message": "full"} if is_full else found).encode()
        self.send_response(503 if is_full else 200)
        if is_full:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def full_server(request: pytest.FixtureRequest) -> Iterator[FullServer]:
    with FullServer(request.param) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def scored(server: FullServer, **options: Any) -> list[tuple[float, bool]]:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    model = ServerLM(base_url=url, **options)
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
