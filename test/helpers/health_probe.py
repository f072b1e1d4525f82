"""Probes ``/health`` from a process of its own, whose clock no other client delays.

    python test/helpers/health_probe.py HOST PORT SECONDS

prints a JSON object: the statuses with their numbers, and the milliseconds of each
probe. Each has a new connection, as those of Kubernetes.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from statistics import median

INTERVAL = 0.05
TIMEOUT = 10.0


@dataclass(frozen=True)
class Probes:
    """The answers of the probes.

    Attributes:
        statuses: how many had each status; ``none`` where no answer came.
    """

    statuses: dict[str, int]
    milliseconds: list[float]

    @property
    def median(self) -> float:
        return round(median(self.milliseconds), 1)

    @property
    def worst(self) -> float:
        return round(max(self.milliseconds), 1)


class Prober:
    """A process that probes a server for some seconds."""

    def __init__(self, port: int, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, "127.0.0.1", str(port), str(seconds)],
            stdout=subprocess.PIPE,
        )

    def result(self) -> Probes:
        out, _ = self._process.communicate()
        return Probes(**json.loads(out))


def _main(host: str, port: int, seconds: float) -> None:
    statuses: Counter[str] = Counter()
    milliseconds = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        try:
            connection.request("GET", "/health")
            statuses[str(connection.getresponse().status)] += 1
        except OSError:
            statuses["none"] += 1
        connection.close()
        milliseconds.append(1000 * (time.perf_counter() - began))
        time.sleep(INTERVAL)
    print(json.dumps({"statuses": statuses, "milliseconds": milliseconds}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
