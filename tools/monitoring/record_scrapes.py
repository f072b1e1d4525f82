"""Records what a server's /metrics says to the board under a load of mixed requests.

``python -m tools.monitoring.record_scrapes http://127.0.0.1:30000 FILE.json.gz``.
``draw_board.py`` draws the board's panels from the file.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import requests

from tools.monitoring.board import text as board_text


def _options(**options: Any) -> dict[str, Any]:
    return {"custom_params": {"dllm": options}}


REQUESTS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 64},
    {"max_tokens": 96} | _options(algorithm="LLaDA", steps=32),
    {"max_tokens": 128} | _options(cache="dual", block_size=16),
    {"max_tokens": 64} | _options(algorithm="EntropyThreshold"),
    {"max_tokens": 48, "temperature": -1},
)
"""The last one is refused, so that the board has refusals to show."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--interval", type=float, default=2)
    parser.add_argument("--clients", type=int, default=6)
    args = parser.parse_args()
    stop = threading.Event()
    clients = [
        threading.Thread(target=_ask, args=(args.url, i, args.clients, stop))
        for i in range(args.clients)
    ]
    for client in clients:
        client.start()
    scrapes, began = [], time.time()
    names = set(re.findall(r"sglang:\w+", board_text()))
    while time.time() - began < args.seconds:
        text = requests.get(f"{args.url}/metrics", timeout=60).text
        lines = [x for x in text.splitlines() if x.partition("{")[0] in names]
        scrapes.append({"seconds": time.time() - began, "lines": lines})
        if time.time() - began > args.seconds * 0.85:
            # The end of the record shows how a server becomes idle.
            stop.set()
        time.sleep(args.interval)
    stop.set()
    for client in clients:
        client.join()
    args.file.write_bytes(gzip.compress(json.dumps(scrapes).encode(), mtime=0))


def _ask(url: str, client: int, num_clients: int, stop: threading.Event) -> None:
    # Clients come one after the other, so that the load grows.
    if stop.wait(client * 4):
        return
    for number in itertools.count(client):
        if stop.is_set():
            return
        body = {
            "model": "demo",
            "prompt": f"Tom has {number} apples. He buys {number % 7} more.",
            **REQUESTS[number % len(REQUESTS)],
        }
        requests.post(f"{url}/v1/completions", json=body, timeout=300)
        stop.wait(0.05 * (num_clients - client))


if __name__ == "__main__":
    main()
