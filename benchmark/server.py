"""A server of a benchmark's own: its process, its prompts, its requests."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol, Self

import psutil
import urllib3

from benchmark.command import BenchmarkError

MAX_CONNECTIONS = 256
START_SECONDS = 300


def free_port() -> int:
    """A port that is free now, below the range of outgoing connections.

    A server binds its port some 20 seconds later. Until then, any connection on this
    machine may take a port of that range, and the server would not start. Test runs
    side by side choose from different ports, and leave those above to the servers'
    own processes, which take one up to 1000 higher.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4
    first = 20_000 + 3_000 * worker
    while True:
        port = random.SystemRandom().randrange(first, first + 1_500)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


SGLANG = "from sglang.cli.main import main; main()"
"""The ``sglang`` command of this interpreter, which may have no scripts beside it."""


class ServerProcess(Protocol):
    """The part of ``subprocess.Popen`` that a server needs."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...


class Server:
    """The process group of one ``sglang serve``, and its log."""

    def __init__(
        self,
        model_path: Path | str,
        args: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = log
        words = [
            *("-c", SGLANG, "serve", "--model-path", str(model_path)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *args,
        ]
        self.process = self.launch(words, env or {})

    def launch(self, words: Sequence[str], env: dict[str, str]) -> ServerProcess:
        """Start ``python`` with these words in a session of its own."""
        with self.log.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def wait_until_ready(self) -> Self:
        """Wait until ``/health`` answers, and return the server.

        Raises:
            RuntimeError: the server ended or took too long, with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        url = f"{self.base_url}/health"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at start:\n{self.tail()}")
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if urllib3.request("GET", url, retries=False, timeout=5).status == 200:
                    return self
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the server was not ready in time:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Kill the process group. SGLang takes five seconds for an orderly end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def local_server(model_path: str, algorithm: str, *flags: str) -> Iterator[Server]:
    """A ready server on a free port. It is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = Server(model_path, ["--dllm-algorithm", algorithm, *flags], log)
        try:
            yield server.wait_until_ready()
        finally:
            server.stop()


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        ids: the visible answer.
        forwards: NFE of the request.
        meta: ``meta_info`` of the response.
    """

    ids: list[int]
    forwards: int
    seconds: float
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


Ask = Callable[[list[int]], Reply]


def server_ask(
    base_url: str,
    dllm: dict[str, Any],
    answer_len: int | None = None,
    canvas_len: int | None = None,
    **others: Any,
) -> Ask:
    """A function that asks ``/generate`` at temperature 0.

    Args:
        dllm: the algorithm and the options of the request.
        answer_len: tokens of the answer.
        canvas_len: tokens of prompt and answer together, instead of ``answer_len``.
        others: more sampling parameters.
    """
    assert (answer_len is None) != (canvas_len is None)
    # The scheduler's CPU time is measured beside the client's: urllib3 is a light
    # client. It keeps its connections, as OpenAI's client does.
    pool = urllib3.PoolManager(maxsize=MAX_CONNECTIONS, retries=False, timeout=600)

    def ask(prompt: list[int]) -> Reply:
        sampling = {
            "max_new_tokens": answer_len or max(1, (canvas_len or 0) - len(prompt)),
            "temperature": 0,
            "custom_params": {"dllm": dllm},
            **others,
        }
        began = time.perf_counter()
        body = {"input_ids": prompt, "sampling_params": sampling}
        try:
            response = pool.request("POST", f"{base_url}/generate", json=body)
        except urllib3.exceptions.HTTPError as error:
            raise BenchmarkError(f"no answer from {base_url}: {error}") from None
        seconds = time.perf_counter() - began
        if response.status != 200:
            raise BenchmarkError(f"/generate answered {response.data[:300]!r}")
        answer = response.json()
        meta = answer["meta_info"]
        forwards = meta["num_forwards"]
        return Reply(answer["output_ids"], forwards, seconds, answer["text"], meta)

    return ask


def ask_all(
    ask: Ask, prompts: Sequence[list[int]], concurrency: int
) -> tuple[list[Reply], float]:
    """The replies in the order of the prompts, and the seconds until the last one."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(ask, prompts))
    return replies, time.perf_counter() - began


def heldout_prompts(model_path: str, num: int) -> list[list[int]]:
    """The first held-out problems of the demo model as prompts of a chat."""
    from sglang_dllm.demo.problems import heldout

    return chat_prompts(model_path, [problem.question for problem in heldout(num)])


def chat_prompts(model_path: str, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of each question as the user's turn."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]


def scheduler_of(server: Server) -> psutil.Process:
    """The server's process that runs the model."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if "sglang::scheduler" in " ".join(process.cmdline()):
            return process
    raise BenchmarkError("the server has no scheduler process")


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of all threads so far, in steps of 0.01 s."""
    times = process.cpu_times()
    return float(times.user + times.system)


def median_ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios of each round.

    A slow moment of the machine slows both sides of one round, so it cancels.
    """
    return median(a / b for a, b in zip(ours, base, strict=True))
