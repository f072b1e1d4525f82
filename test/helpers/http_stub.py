"""A small HTTP server of a test, on a free port of this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class StubServer(ThreadingHTTPServer):
    """It answers from ``with`` on until the end of the block.

    Attributes:
        base_url: its address.
    """

    daemon_threads = True

    def __init__(self, handler: type[StubHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class StubHandler(BaseHTTPRequestHandler):
    """One request; the subclass has ``do_GET`` and ``do_POST``."""

    def body(self) -> Any:
        """The JSON that the client sent."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, answer: Any, **headers: str) -> None:
        """Send bytes, or the JSON of anything else.

        Args:
            headers: more of them, with ``_`` for ``-``.
        """
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
