"""Starts, asks and stops real servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The processes of one `python -m sglang.launch_server`, and their log."""

    def __init__(
        self,
        model_path: Path | str,
        args: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(model_path)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *args,
        ]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def wait_until_ready(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at start:\n{self.tail()}")
            try:
                if requests.get(f"{self.base_url}/health", timeout=5).ok:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server was not ready in time:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Kill the process group: SGLang takes five seconds to end on a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(self.base_url + path, json=body, timeout=300)

    def generate(self, input_ids: list[int], **sampling: Any) -> dict[str, Any]:
        response = self.post("/generate", input_ids=input_ids, sampling_params=sampling)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def load(self) -> dict[str, Any]:
        """Numbers of running and waiting requests and of used tokens, for routers."""
        response = requests.get(f"{self.base_url}/v1/loads", timeout=30)
        (load,) = response.json()["loads"]
        return dict(load)

    def wait_until_idle(self, seconds: float = 30) -> dict[str, Any]:
        """Wait until nothing runs, and return the load.

        Raises:
            AssertionError: a request still runs, waits or holds tokens in the end.
        """
        deadline = time.monotonic() + seconds
        while True:
            load = self.load()
            held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
            if not any(load[name] for name in held):
                return load
            if time.monotonic() > deadline:
                raise AssertionError(f"not idle after {seconds} s: {load}")
            time.sleep(0.2)
