"""Clients that read slowly, not at all, or vanish."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import ExitStack
from typing import Any

KINDS = ("slow", "unread", "half sent", "head only", "vanished", "half closed")
"""How a client behaves: it reads a byte now and then; it never reads; it sends half of
its body; it sends half of its head; it resets the connection; it closes its side."""


class SlowClients:
    """Connections of all kinds to one server, each with a long stream.

    The buffers of a connection are small, so that the server notices a client that does
    not read.
    """

    def __init__(self, port: int, body: dict[str, Any], num_each: int) -> None:
        self._sockets = ExitStack()
        self._slow: list[socket.socket] = []
        self.num = 0
        text = json.dumps(body).encode()
        head = (
            "POST /generate HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        ).encode()
        for _ in range(num_each):
            for kind in KINDS:
                self._open(port, kind, head, text)

    def _open(self, port: int, kind: str, head: bytes, text: bytes) -> None:
        client = self._sockets.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(10)
        client.connect(("127.0.0.1", port))
        self.num += 1
        if kind == "head only":
            client.sendall(head[:30])
        elif kind == "half sent":
            client.sendall(head + text[: len(text) // 2])
        else:
            client.sendall(head + text)
        if kind == "slow":
            self._slow.append(client)
        elif kind == "half closed":
            client.shutdown(socket.SHUT_WR)
        elif kind == "vanished":
            client.recv(100)
            # A reset instead of an orderly end.
            no_linger = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            client.close()

    def read(self, seconds: float) -> None:
        """The slow ones read a byte each now and then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for client in self._slow:
                client.recv(1)
            time.sleep(0.1)

    def close(self) -> None:
        """All the others vanish too."""
        self._sockets.close()
