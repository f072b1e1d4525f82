"""The parts of a launch, without a server."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import setproctitle
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sglang_dllm.errors import ConfigError
from sglang_dllm.launching import processes, server
from sglang_dllm.launching.address import check_address
from sglang_dllm.launching.doorkeeper import Doorkeeper
from sglang_dllm.launching.end_note import End, EndNote, bad_input, one_line, reported
from sglang_dllm.launching.processes import Gone, Watch
from sglang_dllm.launching.queue_bound import Load, QueueBound
from sglang_dllm.serving.routes import OwnPaths

LOCAL = "127.0.0.1"


@pytest.fixture
def launch() -> Iterator[server.ServerLaunch]:
    yield server.begin()
    server.finish()
    assert server.current() is None


# Address


def test_a_port_that_is_listened_on_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind((LOCAL, 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host in (LOCAL, "0.0.0.0", "localhost"):
            with pytest.raises(ConfigError, match=f"--port={port}: another process"):
                check_address(host, port)
    check_address(LOCAL, port)


def test_a_port_whose_server_has_just_ended_is_free() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOCAL, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((LOCAL, port)):
            accepted, _ = listener.accept()
            accepted.close()
    check_address(LOCAL, port)


LISTENS_LATE = """
import socket, sys
from sglang_dllm.launching import processes, server
from sglang_dllm.patches.server_processes import _on_startup
with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    _on_startup(server.begin(), *taken.getsockname())
"""


def test_a_port_that_is_taken_while_the_model_loads_ends_the_launch() -> None:
    command = [sys.executable, "-c", LISTENS_LATE]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "another process listens on 127.0.0.1" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        (LOCAL, 0, "expected 1 to 65535"),
        (LOCAL, 65_536, "expected 1 to 65535"),
        (LOCAL, -1, "expected 1 to 65535"),
        ("192.0.2.1", 31_999, "this machine has no such address"),
        ("no.such.host.invalid", 31_999, "--host='no.such.host.invalid'"),
    ],
)
def test_an_address_that_cannot_be(host: str, port: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_address(host, port)


# The note


def test_the_first_failure_is_the_reason(launch: server.ServerLaunch) -> None:
    note = EndNote.of_this_server()
    assert note is not None and note.read() is None
    with pytest.raises(SystemExit) as ended, reported("a scheduler"):
        raise ConfigError("one\n  line")
    assert ended.value.code == 2
    with pytest.raises(KeyError), reported("a detokenizer"):
        raise KeyError("later")
    assert launch.note.read() == End(2, "one line")


def test_an_unknown_error_names_its_process(launch: server.ServerLaunch) -> None:
    with pytest.raises(KeyError), reported("the scheduler"):
        raise KeyError("x")
    reason = f"the scheduler (pid {os.getpid()}) failed: KeyError: 'x'"
    assert launch.note.read() == End(1, reason)


def test_a_pool_that_does_not_fit_is_a_wrong_flag(launch: server.ServerLaunch) -> None:
    """SGLang's own error, in the words that this version has."""
    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

    with pytest.raises(SystemExit) as ended, reported("the scheduler"):
        MemoryPoolConfig(max_total_num_tokens=0, mem_fraction_static=0.001)
    assert ended.value.code == 2
    found = launch.note.read()
    assert found is not None and found.status == 2
    assert found.reason.startswith("Not enough memory.")
    assert "--mem-fraction-static" in found.reason
    # A newer SGLang finds it before, and says so by another class.
    with pytest.raises(SystemExit) as ended, reported("the scheduler"):
        raise ValueError("no memory for the KV cache under --mem-fraction-static=0.1")
    assert ended.value.code == 2


def test_no_server_of_ours_no_note() -> None:
    assert EndNote.of_this_server() is None
    with pytest.raises(ConfigError), reported("the scheduler"):
        raise ConfigError("it passes")


def test_errors_of_libraries_become_one_line() -> None:
    words = r"^the file: a b$"
    with pytest.raises(ConfigError, match=words), bad_input("the file", OSError):
        raise OSError("a\nb")
    with pytest.raises(KeyError), bad_input("the file", OSError):
        raise KeyError("x")
    assert len(one_line(ValueError("x" * 9_000))) < 700
    assert one_line(AssertionError()) == "AssertionError"


def test_a_killed_process_is_the_reason_of_the_others_failures(
    launch: server.ServerLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.why() is None
    with pytest.raises(KeyError), reported("the scheduler"):
        raise KeyError("x")
    noted = launch.note.read()
    assert launch.why() == noted
    for was_killed, expected in ((False, noted), (True, End(1, "a rank"))):
        gone = Gone("a rank", was_killed)
        monkeypatch.setattr(launch.watch, "gone", lambda gone=gone: gone)
        assert launch.why() == expected


# Processes

CHILD = """
import setproctitle, sys, time
setproctitle.setproctitle("sglang::scheduler")
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_that_is_killed_is_seen_and_named() -> None:
    seen: list[Any] = []
    watch = Watch(lambda: seen.append(watch.gone()), lambda: False)
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=-1) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        watch.complete()
        watch.start()
        assert watch.gone() is None
        child.kill()
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            time.sleep(0.05)
    text = f"sglang::scheduler (pid {child.pid}) was killed by SIGKILL"
    assert seen == [Gone(text, was_killed=True)]


def sleep_under_a_title() -> None:
    setproctitle.setproctitle("sglang::detokenizer")
    time.sleep(60)


def test_a_process_whose_status_was_taken_is_named_too() -> None:
    """SGLang's own watch may be the first to ask how a process ended."""
    child = multiprocessing.get_context("fork").Process(target=sleep_under_a_title)
    child.start()
    watch = Watch(lambda: None, lambda: False)
    deadline = time.monotonic() + 10
    while "sglang::" not in "".join(psutil.Process(child.pid).cmdline()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watch.complete()
    assert watch.gone() is None
    child.kill()
    child.join()
    text = f"sglang::detokenizer (pid {child.pid}) was killed by SIGKILL"
    assert watch.gone() == Gone(text, was_killed=True)


def test_a_status_that_was_taken_is_noted_a_moment_later() -> None:
    """By the thread of SGLang's watch, which has to wait for the interpreter."""

    codes = iter((None, None, -9))

    class Owner:
        @property
        def exitcode(self) -> int | None:
            return next(codes)

    owner: Any = Owner()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    text = f"sglang::scheduler (pid {child.pid}) was killed by SIGKILL"
    assert Gone.of(child.pid, "sglang::scheduler", owner) == Gone(text, was_killed=True)


def test_a_process_that_has_failed_and_hangs_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_TIME_TO_GO", 1.0)
    seen, has_failed = threading.Event(), threading.Event()
    watch = Watch(seen.set, has_failed.is_set)
    watch.start()
    assert not seen.wait(1.5)
    has_failed.set()
    assert seen.wait(5)


CONTROLLER = """
import setproctitle, subprocess, sys
title = "sglang::data_parallel_controller"
setproctitle.setproctitle(title)
child = "import setproctitle as s, time; s.setproctitle(%r); print(1, flush=True)"
child += "; time.sleep(60)"
for name in ("sglang::scheduler_DP0", title):
    words = [sys.executable, "-c", child % name]
    subprocess.Popen(words, stdout=subprocess.PIPE).stdout.readline()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_rank_below_a_controller_is_seen() -> None:
    """A fork of the controller, with its title, may go."""
    watch = Watch(lambda: None, lambda: False)
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLER], stdin=-1, stdout=-1
    ) as controller:
        assert controller.stdout is not None
        assert controller.stdout.readline() == b"ready\n"
        ranks = psutil.Process(controller.pid).children()
        watch.complete()
        fork, rank = sorted(ranks, key=lambda p: p.cmdline()[0])
        for process in (fork, rank):
            assert watch.gone() is None
            process.kill()
            # Nobody takes their status.
            while process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        gone = watch.gone()
        assert gone == Gone(f"sglang::scheduler_DP0 (pid {rank.pid}) has gone", False)
        controller.kill()


# Probes and newcomers


async def _answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"SGLang: {request.url.path}")


GIVEN: dict[str, Any] = {
    "is_up": lambda: True,
    "on_startup": lambda: None,
    "queue": QueueBound(1, lambda: 0, Load),
    "queued_paths": {"/generate"},
    "on_refusal": lambda stage: None,
}


def client(launch: server.ServerLaunch, **changes: Any) -> TestClient:
    paths = ("/health", "/health_generate", "/generate", "/abort_request")
    routes = [Route(path, _answer, methods=["GET", "POST"]) for path in paths]
    app: Any = Starlette(routes=routes)
    return TestClient(Doorkeeper(app, launch, **{**GIVEN, **changes}))


def test_health_is_answered_before_sglang(launch: server.ServerLaunch) -> None:
    assert client(launch).get("/health").text == ""
    assert client(launch).get("/health_generate").text.startswith("SGLang")
    assert client(launch, is_up=lambda: False).get("/health").status_code == 503


@pytest.mark.parametrize("prefix", ["", "/dllm", "/dllm/dllm"])
def test_probes_need_no_key_behind_the_path_of_a_proxy(
    launch: server.ServerLaunch, prefix: str
) -> None:
    routes = [Route(path, _answer) for path in ("/health", "/health_generate", "/x")]
    app: Any = Starlette(routes=routes)
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    app.add_middleware(Doorkeeper, launch=launch, **GIVEN)
    door = TestClient(OwnPaths(app), root_path="/dllm")
    assert door.get(f"{prefix}/x").status_code == 401
    assert door.get(f"{prefix}/health").text == ""
    assert door.get(f"{prefix}/health_generate").text == "SGLang: /health_generate"
    launch.on_signal(15)
    assert door.get(f"{prefix}/health").status_code == 503


def test_health_generates_where_the_user_wants_it(
    launch: server.ServerLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "true")
    assert client(launch).get("/health").text.startswith("SGLang")


def test_newcomers_are_refused_during_the_drain(launch: server.ServerLaunch) -> None:
    door = client(launch)
    assert door.post("/generate").status_code == 200
    launch.on_signal(15)
    refused = door.post("/generate")
    assert (refused.status_code, refused.json()["code"]) == (503, 503)
    assert door.get("/health").status_code == 503
    assert door.post("/abort_request").status_code == 200


def test_the_drain_waits_for_the_last_answer(launch: server.ServerLaunch) -> None:
    async def drain() -> list[str]:
        order: list[str] = []
        with launch.answering():
            ended = asyncio.create_task(launch.drained())
            launch.on_signal(15)
            await asyncio.sleep(0.3)
            assert not ended.done()
            order.append("answered")
        await ended
        return [*order, "drained"]

    assert asyncio.run(drain()) == ["answered", "drained"]


def test_it_starts_before_the_first_request(launch: server.ServerLaunch) -> None:
    started: list[str] = []
    with client(launch, on_startup=lambda: started.append("yes")):
        assert started == ["yes"]


def test_a_full_disk_does_not_stop_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process would live on without its server."""
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        End(1, "a rank was killed").tell()
        monkeypatch.undo()
