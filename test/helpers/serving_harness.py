"""A real server, with the questions that tests ask it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import requests

from benchmark.server import Server as BenchmarkServer
from benchmark.server import ServerProcess
from helpers.warm_start import Fork


class Server(BenchmarkServer):
    """A server that a test can ask."""

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(self.base_url + path, json=body, timeout=300)

    def generate(self, input_ids: list[int], **sampling: Any) -> dict[str, Any]:
        response = self.post("/generate", input_ids=input_ids, sampling_params=sampling)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream."""
        return events_of(self.post(path, **{**body, "stream": True}))

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


class WarmServer(Server):
    """A server whose processes have not to import SGLang."""

    def launch(self, words: Sequence[str], env: dict[str, str]) -> ServerProcess:
        return Fork(words, self.log, env=env)


def events_of(stream: requests.Response) -> list[dict[str, Any]]:
    """The events of a stream that has ended.

    Raises:
        AssertionError: it has another status than 200, or no end.
    """
    assert stream.status_code == 200, stream.text
    lines = stream.content.splitlines()
    *parts, end = [line[6:] for line in lines if line.startswith(b"data: ")]
    found = [json.loads(part) for part in parts]
    if end != b"[DONE]":
        # Anthropic's events tell their kind, and the last one is the end.
        found.append(json.loads(end))
        assert found[-1]["type"] == "message_stop"
    return found
