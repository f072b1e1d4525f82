"""The cost of SGLang's router for a request and for an event of a stream.

    python -m benchmark.router_cost [--requests 2000] [--events 100] [--json OUT]

Its workers are stubs that answer at once, so the figures hold for any model. CPU time
is that of the router's process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import urllib3

from benchmark.command import Figures, at_least, parser_of, run_command
from benchmark.router import Router, is_installed
from benchmark.server import cpu_seconds, free_port

CLIENTS = 8
EVENT_SECONDS = 0.005
"""Events that come at once would be read as one."""
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x" * 400}]}
EVENT = json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 40}}]})


def serve_stub(port: int) -> None:
    """Answer as a server, at once; ``max_tokens`` is the number of events."""
    from aiohttp import web

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "demo"}]})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            message = {"role": "assistant", "content": "x" * 400}
            return web.json_response({"choices": [{"index": 0, "message": message}]})
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for _ in range(body["max_tokens"]):
            await stream.write(f"data: {EVENT}\n\n".encode())
            await asyncio.sleep(EVENT_SECONDS)
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def other(_: web.Request) -> web.Response:
        return web.json_response({"served_model_name": "demo", "model_path": "demo"})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/{path:.*}", other)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


@contextmanager
def stub() -> Iterator[str]:
    """The base URL of a stub worker in a process of its own."""
    port = free_port()
    code = f"from benchmark.router_cost import serve_stub; serve_stub({port})"
    process = subprocess.Popen([sys.executable, "-c", code])
    url = f"http://127.0.0.1:{port}"
    try:
        patience = urllib3.Retry(12, backoff_factor=0.1)
        urllib3.request("GET", f"{url}/health", retries=patience)
        yield url
    finally:
        process.kill()
        process.wait()


def ask_many(url: str, num: int, **more: Any) -> float:
    """Ask ``num`` times; returns the seconds."""
    pool = urllib3.PoolManager(maxsize=CLIENTS, retries=False, timeout=60)

    def ask(_: int) -> None:
        answer = pool.request("POST", f"{url}/v1/chat/completions", json=CHAT | more)
        if answer.status != 200:
            raise RuntimeError(f"the router answered {answer.data[:200]!r}")

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(num)))
    return time.perf_counter() - began


def measure(args: argparse.Namespace) -> Figures:
    if not is_installed():
        raise RuntimeError("the router is not installed: pip install smg")
    num, events = args.requests, args.events
    with ExitStack() as stack:
        workers = [stack.enter_context(stub()) for _ in range(2)]
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        router = Router(workers, Path(folder) / "log", "--policy", "round_robin")
        stack.callback(router.stop)
        url = router.wait_until_ready().base_url
        process = psutil.Process(router.process.pid)

        def cost(count: int, **more: Any) -> tuple[float, float]:
            ask_many(url, CLIENTS, **more)
            before = cpu_seconds(process)
            seconds = ask_many(url, count, **more)
            return (cpu_seconds(process) - before) / count, seconds / count

        request, seconds = cost(num)
        num_streams = 10 * CLIENTS
        few, _ = cost(num_streams, stream=True, max_tokens=1)
        many, _ = cost(num_streams, stream=True, max_tokens=1 + events)
        direct = ask_many(workers[0], num) / num
        return {
            "requests": num,
            "cpu_ms_request": 1e3 * request,
            "cpu_us_event": 1e6 * (many - few) / events,
            "ms_request_routed": 1e3 * seconds * CLIENTS,
            "ms_request_direct": 1e3 * direct * CLIENTS,
            "resident_mib": process.memory_info().rss / 2**20,
        }


def show(figures: Figures) -> str:
    rows = (
        ("CPU time of the router for a request", "cpu_ms_request", "ms"),
        ("for an event of a stream", "cpu_us_event", "us"),
        (f"latency, {CLIENTS} at once, through the router", "ms_request_routed", "ms"),
        (f"latency, {CLIENTS} at once, of a stub", "ms_request_direct", "ms"),
        ("resident memory of the router", "resident_mib", "MiB"),
    )
    return "\n".join(
        f"{text:42}{figures[name]:9.2f} {unit}" for text, name, unit in rows
    )


def build_parser() -> argparse.ArgumentParser:
    made = parser_of(__doc__)
    made.add_argument("--requests", type=at_least(100, int), default=2000)
    made.add_argument("--events", type=at_least(10, int), default=100)
    return made


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
