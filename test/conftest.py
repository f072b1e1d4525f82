"""Options, markers, hypothesis profiles, and the servers that tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from helpers.serving_harness import Server, WarmServer

DEMO = Path(__file__).parent.parent / "python" / "sglang_dllm" / "demo" / "checkpoint"
# Models of the tests are tiny: with more threads they wait for each other, and a run
# takes several times as long. Servers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest's --hypothesis-profile chooses one: `make test-quick` takes "quick".
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("full", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("full")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the GSM8K test (a real checkpoint, not the demo) and of the storm."""
    group = parser.getgroup("gsm8k")
    group.addoption("--gsm8k-model", help="checkpoint folder; default: the demo model")
    group.addoption("--gsm8k-data", help="JSONL file; default: held-out demo problems")
    group.addoption("--gsm8k-num", type=int, default=200)
    group.addoption("--gsm8k-prompt", choices=["chat", "plain"], default="chat")
    group.addoption("--gsm8k-max-new-tokens", type=int)
    group.addoption("--gsm8k-algorithm", default="FullAttnMultiBlock")
    group.addoption("--gsm8k-min-accuracy", type=float)
    group.addoption("--gsm8k-min-tpf", type=float)
    storm = parser.getgroup("soak")
    storm.addoption("--soak-minutes", type=float, default=0.5, help="of two servers")
    storm.addoption("--soak-seed", type=int, default=0)
    storm.addoption("--soak-report", help="folder for soak.md and soak.json")
    page = parser.getgroup("page")
    page.addoption("--screenshots", help="folder for pictures of the page")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Choose and order the tests.

    Tests of CUDA kernels are left out on a machine that has no CUDA device. Files that
    start servers come first: they mostly wait, and two of them run at a time.
    """
    test = Path(__file__).parent
    items.sort(key=lambda i: i.path.relative_to(test).parts[0] not in _WITH_SERVERS)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in set(on_gpu)]
        config.hook.pytest_deselected(items=on_gpu)
        config.stash[_NEED_GPU] = len(on_gpu)


_WITH_SERVERS = ("serve", "page", "parity", "registered", "soak", "deploy", "fleet")
_NEED_GPU = pytest.StashKey[int]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if num := config.stash.get(_NEED_GPU, 0):
        terminalreporter.write_line(
            f"{num} tests are left out: they carry the marker 'gpu', and this machine "
            "has no CUDA device"
        )


@pytest.fixture(scope="module")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """``start_server(model_path, *flags, env=None)``: a server that is ready.

    The same arguments give the same server as long as it lives. All are stopped at the
    end of the file: servers that nobody asks any more fill the memory, and each later
    start then reads its libraries from the disk.
    """
    servers: dict[object, Server] = {}

    def start(
        model_path: Path | str, *flags: str, env: dict[str, str] | None = None
    ) -> Server:
        key = (str(model_path), flags, tuple(sorted((env or {}).items())))
        server = servers.get(key)
        if server is None or server.process.poll() is not None:
            log = tmp_path_factory.mktemp("server") / "log"
            server = servers[key] = WarmServer(model_path, flags, log, env)
            server.wait_until_ready()
        return server

    yield start
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded demo model under FullAttnMultiBlock, as `make serve` starts it.

    It lives until the end of the run. No test may bring a traceback into its log,
    whichever tests share it.
    """
    flags = (
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--served-model-name", "demo", "--enable-metrics"),
    )
    server = Server(DEMO, flags, tmp_path_factory.mktemp("server") / "log")
    server.wait_until_ready()
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text(errors="replace")
