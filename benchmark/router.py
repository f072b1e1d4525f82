"""SGLang's router as a process, in front of servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import requests

from benchmark.server import free_port

PACKAGE = "smg"
FLAGS = (
    *("--retry-max-retries", "3"),
    *("--cb-failure-threshold", "3", "--cb-timeout-duration-secs", "10"),
    *("--health-check-interval-secs", "2", "--health-failure-threshold", "2"),
    *("--worker-wedge-secs", "120", "--load-monitor-interval", "1"),
    *("--worker-startup-check-interval", "1", "--disable-tokenizer-autoload"),
)
"""docs/fleets.md has the reason of each."""
START_SECONDS = 60


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


class Router:
    """One router over HTTP, its address and its log.

    Args:
        workers: base URLs of servers that are ready.
        log: the file that gets its output.
        flags: more flags than ``FLAGS``.
    """

    def __init__(self, workers: Sequence[str], log: Path, *flags: str) -> None:
        self.base_url = f"http://127.0.0.1:{(port := free_port())}"
        self.metrics_url = f"http://127.0.0.1:{(metrics_port := free_port())}/metrics"
        self.log = log
        command = [
            *(sys.executable, "-m", PACKAGE, "launch"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1"),
            *("--prometheus-port", str(metrics_port)),
            *("--worker-urls", *workers),
            *FLAGS,
            *flags,
        ]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.num_workers = len(workers)

    def wait_until_ready(self) -> Self:
        """Wait until all workers are registered and healthy.

        Raises:
            RuntimeError: the router ended or took too long, with its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.RequestException, ValueError):
                if len(self.healthy()) == self.num_workers:
                    return self
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"the router is not ready:\n{self.log.read_text()[-4000:]}")

    def healthy(self) -> list[str]:
        """The URLs of the workers that take requests."""
        response = requests.get(f"{self.base_url}/workers", timeout=10)
        workers = response.json()["workers"]
        return [worker["url"] for worker in workers if worker["status"] == "ready"]

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(self.base_url + path, json=body, timeout=300)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
