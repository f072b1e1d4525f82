"""Probes, and requests that come too late: what is answered before SGLang."""

from __future__ import annotations

import os
from collections.abc import Callable, Container

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_dllm.launching.queue_bound import QueueBound
from sglang_dllm.launching.refusal import refuse
from sglang_dllm.launching.server import ServerLaunch

_GENERATES = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
"""SGLang's variable: whether ``/health`` generates a token, as ``/health_generate``."""

HELPS_TO_END = ("/abort_request", "/continue_generation")
"""Routes that are open during the drain: without them it might not come to an end."""

_DRAINS = "the server is shutting down and takes no new requests"


class Doorkeeper:
    """ASGI middleware of a server of ours.

    It counts the requests that are being answered, and refuses new ones during the
    drain and while the queue is full. ``/health`` is answered here: SGLang would
    generate a token, which takes a second and more.
    """

    def __init__(
        self,
        app: ASGIApp,
        launch: ServerLaunch,
        is_up: Callable[[], bool],
        on_startup: Callable[[], None],
        queue: QueueBound,
        queued_paths: Container[str],
        on_refusal: Callable[[str], None],
    ) -> None:
        """
        Args:
            is_up: whether SGLang takes the server as started and healthy.
            on_startup: called in the event loop before the first request.
            queue: says whether a request may enter.
            queued_paths: routes whose requests wait in the queue.
            on_refusal: called with ``queue`` or ``drain`` for each refused request.
        """
        self._app = app
        self._launch = launch
        self._is_up = is_up
        self._on_startup = on_startup
        self._queue = queue
        self._queued_paths = queued_paths
        self._on_refusal = on_refusal
        given = os.environ.get(_GENERATES, "")
        self._answers_health = given.lower() not in ("1", "true", "yes", "y")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._on_startup()
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if path == "/health" and self._answers_health:
                is_well = self._is_up() and not self._launch.is_draining
                await _answer_probe(send, 200 if is_well else 503)
            else:
                await self._app(scope, receive, send)
            return
        if path in HELPS_TO_END:
            await self._app(scope, receive, send)
            return
        if self._launch.is_draining:
            self._on_refusal("drain")
            wait = self._launch.seconds_to_restart
            await refuse(send, path, _DRAINS, wait, closes=True)
            return
        if path not in self._queued_paths:
            with self._launch.answering():
                await self._app(scope, receive, send)
            return
        seconds = self._queue.refusal()
        if seconds is not None:
            self._on_refusal("queue")
            message = f"the request queue is full; try again in {seconds} seconds"
            await refuse(send, path, message, seconds)
            return
        with self._launch.answering(), self._queue.entering():
            await self._app(scope, receive, send)


async def _answer_probe(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
