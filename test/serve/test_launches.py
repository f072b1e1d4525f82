"""How a server ends: by a signal, with a killed process, or before it is ready."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from helpers.launch_ends import ends
from helpers.serving_harness import WarmServer
from sglang_dllm.demo import demo_path

ALGORITHM = ("--dllm-algorithm", "FullAttnMultiBlock")
SLOW = {"algorithm": "EntropyThreshold", "threshold": 0}
"""One token a step: a request of 200 tokens takes seconds."""


class Launched(WarmServer):
    """A server that a test ends."""

    def __init__(self, log: Path, *flags: str) -> None:
        args = (*ALGORITHM, "--served-model-name", "demo", *flags)
        super().__init__(demo_path(), args, log)
        self.wait_until_ready()

    def health(self, path: str = "/health") -> int:
        """The status of a probe."""
        return requests.get(self.base_url + path, timeout=30).status_code

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def process_named(self, title: str) -> psutil.Process:
        (found,) = [p for p in self.processes() if title in "".join(p.cmdline()[:1])]
        return found

    def stream(self, max_tokens: int) -> Streamed:
        return Streamed(self.base_url, max_tokens)

    def end(self, seconds: float) -> int:
        """The exit status; no process may be left, and the port is free."""
        status = self.process.wait(timeout=seconds)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        return status


class Streamed(threading.Thread):
    """A streamed request in a thread of its own."""

    def __init__(self, base_url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.url = f"{base_url}/v1/completions"
        self.body = {
            "model": "demo",
            "prompt": "hi",
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            "custom_params": {"dllm": SLOW},
        }
        self.first = threading.Event()
        self.lines: list[bytes] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with requests.post(
                self.url, json=self.body, stream=True, timeout=200
            ) as got:
                self.first.set()
                self.lines = [line for line in got.iter_lines() if line]
        except requests.RequestException as error:
            self.error = error


def lives(process: psutil.Process) -> bool:
    """False for a zombie too: nobody may be there to take its status."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def last_line(log: str) -> str:
    return log.rstrip().splitlines()[-1]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_probes_wait_for_nobody_and_sigterm_drains(log: Path) -> None:
    server = Launched(log, "--max-running-requests", "2")
    try:
        assert server.health("/health_generate") == 200
        # A token id out of range is a 400; the scheduler lives on.
        ids = server.post("/generate", input_ids=[1_000_000])
        assert ids.status_code == 400
        streams = [server.stream(200) for _ in range(2)]
        assert all(stream.first.wait(60) for stream in streams)
        # This stream waits for the others, and the probes for none of them.
        streams.append(server.stream(200))
        assert {server.health() for _ in range(20)} == {200}
        assert all(stream.is_alive() for stream in streams)

        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while server.health() != 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.health("/health_generate") == 503
        late = server.post("/v1/completions", model="demo", prompt="x", max_tokens=8)
        assert late.status_code == 503
        assert "shutting down" in late.json()["message"]
        for stream in streams:
            stream.join(120)
        assert [stream.lines[-1] for stream in streams] == [b"data: [DONE]"] * 3
        assert server.end(20) == 0
    finally:
        server.stop()
    assert "Traceback" not in log.read_text()


def test_a_killed_process_ends_the_server(log: Path) -> None:
    server = Launched(log)
    try:
        processes = server.processes()
        stream = server.stream(900)
        assert stream.first.wait(30)
        server.process_named("sglang::detokenizer").kill()
        assert server.end(10) == 1
        stream.join(5)
        assert not stream.is_alive() and b"[DONE]" not in b"".join(stream.lines)
        assert not [p for p in processes if lives(p)]
    finally:
        server.stop()
    line = last_line(log.read_text())
    assert line.startswith("sglang-dllm: error: sglang::detokenizer")


def broken(folder: Path, name: str, **config: Any) -> Path:
    """A copy of the demo model with other fields in its config."""
    path = folder / name
    shutil.copytree(demo_path(), path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return path


def test_a_launch_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """test_checkpoint_files.py and test_launching.py have more of them."""
    demo = demo_path()
    no_tokenizer = broken(tmp_path, "no_tokenizer")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    flags = tmp_path / "flags.yaml"
    flags.write_text("tokenizer-worker-num: 2\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            ((tmp_path / "none",), "there is no such folder"),
            ((no_tokenizer,), "there is no tokenizer"),
            ((demo, "--port", port), f"another process listens on 127.0.0.1:{port}"),
            ((demo, "--config", flags), "--tokenizer-worker-num=2"),
            # The launching process finds this one while the scheduler loads,
            ((demo, "--chat-template", "none.jinja"), "none.jinja"),
            # and the scheduler this one.
            ((broken(tmp_path, "wide", d_model=96),), "expects [96]"),
        ]
        asked = [(*words, *ALGORITHM) for words, _ in cases]
        found = ends([("--model-path", *words) for words in asked])
    for (words, expected), (status, output) in zip(cases, found, strict=True):
        line = last_line(output)
        assert line.startswith("sglang-dllm: error: "), (words, output[-3000:])
        assert expected in line, words
        assert "Traceback" not in output, (words, output[-3000:])
        assert status == 2, words
