"""Asking a real server, as the tests need it."""

from __future__ import annotations

import time
from typing import Any

import requests

from benchmark.server import Server as ServerProcess


class Server(ServerProcess):
    """A server that a test can ask."""

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(self.base_url + path, json=body, timeout=300)

    def generate(self, input_ids: list[int], **sampling: Any) -> dict[str, Any]:
        response = self.post("/generate", input_ids=input_ids, sampling_params=sampling)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def load(self) -> dict[str, Any]:
        """Running requests, waiting requests and used tokens, as routers see them."""
        response = requests.get(f"{self.base_url}/v1/loads", timeout=30)
        (load,) = response.json()["loads"]
        return dict(load)

    def wait_until_idle(self, seconds: float = 30) -> dict[str, Any]:
        """The load once nothing runs; raises if that takes longer."""
        deadline = time.monotonic() + seconds
        while True:
            load = self.load()
            held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
            if not any(load[name] for name in held):
                return load
            if time.monotonic() > deadline:
                raise AssertionError(f"not idle after {seconds} s: {load}")
            time.sleep(0.2)
