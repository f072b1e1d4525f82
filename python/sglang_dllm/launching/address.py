"""Refuses an address that a server cannot listen on, before the model is loaded."""

from __future__ import annotations

import errno
import socket

from sglang_dllm.errors import ConfigError


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    The sockets are opened as uvicorn opens them: a port whose last server has just
    ended is free. They are closed again.

    Raises:
        ConfigError: the port is taken or out of range, or the host is not this
            machine's.
    """
    if not 1 <= port <= 65_535:
        raise ConfigError(f"--port={port} is not allowed; expected 1 to 65535")
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"--host={host!r}: {error.strerror or error}") from None
    for family, kind, protocol, _, address in found:
        try:
            _listen(family, kind, protocol, address)
        except OSError as error:
            raise ConfigError(_reason(host, port, error)) from None


def _listen(family: int, kind: int, protocol: int, address: object) -> None:
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError:
        # The machine has no such family, IPv6 for example; uvicorn goes on too.
        return
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(1)


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port={port}: another process listens on {host}:{port}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host={host!r}: this machine has no such address"
    return f"cannot listen on {host}:{port}: {error.strerror}"
