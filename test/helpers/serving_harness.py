"""A real server, with the questions that tests ask it."""

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

    def loads(self) -> list[dict[str, Any]]:
        """Each rank's numbers of running and waiting requests and of used tokens."""
        response = requests.get(f"{self.base_url}/v1/loads", timeout=30)
        return [dict(load) for load in response.json()["loads"]]

    def load(self) -> dict[str, Any]:
        """The numbers of a server of one rank."""
        (load,) = self.loads()
        return load

    def wait_until_idle(self, seconds: float = 30) -> dict[str, Any]:
        """Wait until nothing runs, and return the load of the first rank.

        Raises:
            AssertionError: a request still runs, waits or holds tokens in the end.
        """
        held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        deadline = time.monotonic() + seconds
        while True:
            loads = self.loads()
            if not any(load[name] for load in loads for name in held):
                return loads[0]
            if time.monotonic() > deadline:
                raise AssertionError(f"not idle after {seconds} s: {loads}")
            time.sleep(0.2)
