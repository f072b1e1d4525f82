"""Session-wide servers: each configuration is started once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.serving_harness import Server

DEMO = Path(__file__).parent.parent / "python" / "sglang_dllm" / "demo" / "checkpoint"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the GSM8K test: a real checkpoint instead of the demo."""
    group = parser.getgroup("gsm8k")
    group.addoption("--gsm8k-model", help="checkpoint folder; default: the demo model")
    group.addoption("--gsm8k-data", help="JSONL file; default: held-out demo problems")
    group.addoption("--gsm8k-num", type=int, default=200)
    group.addoption("--gsm8k-prompt", choices=["chat", "plain"], default="chat")
    group.addoption("--gsm8k-max-new-tokens", type=int)
    group.addoption("--gsm8k-algorithm", default="FullAttnMultiBlock")
    group.addoption("--gsm8k-min-accuracy", type=float)
    group.addoption("--gsm8k-min-tpf", type=float)


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """``start_server(model_path, *flags, env=None)``: ready, stopped at the end."""
    servers: list[Server] = []

    def start(
        model_path: Path | str, *flags: str, env: dict[str, str] | None = None
    ) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        server = Server(model_path, flags, log, env)
        servers.append(server)
        return server.wait_until_ready()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def demo_server(start_server: Callable[..., Server]) -> Server:
    """The embedded demo model under FullAttnMultiBlock, as `make serve` starts it."""
    return start_server(
        DEMO,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--served-model-name", "demo", "--enable-metrics"),
    )
