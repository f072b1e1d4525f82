"""Servers that end under load: each client hears of it. Not in the short run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
import requests

from helpers.footprint import no_room_for_files, process_named, processes_of
from helpers.health_probe import Prober
from helpers.random_settings import storm_cases
from helpers.serving_harness import Server
from helpers.soak_table import Budget, Phase, Table
from helpers.storm import ENDED, WHOLE, Storm
from helpers.tiny_checkpoints import write_llada

NAME = "Servers that end under load"
NUM_CLIENTS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("ends") / "llada", seed=1)


@pytest.fixture
def started(checkpoint: Path, budget: Budget) -> Iterator[Callable[[Path], Storm]]:
    """``started(log)``: a server, and what it answers when it is alone."""
    servers: list[Server] = []

    def start(log: Path) -> Storm:
        args = ("--dllm-algorithm", "FullAttnMultiBlock", "--served-model-name", "demo")
        server = Server(checkpoint, args, log)
        servers.append(server)
        cases = storm_cases(random.Random(budget.seed), 1)
        storm = Storm(server.wait_until_ready(), cases, budget.seed)
        storm.ask_alone()
        return storm

    yield start
    for server in servers:
        server.stop()


@contextmanager
def under_load(
    storm: Storm, phase: Phase, goes_on: Callable[[], bool]
) -> Iterator[None]:
    """Clients ask during the block and until ``goes_on`` is False; rows about them."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            lambda: storm.run(60, WHOLE, num_clients=NUM_CLIENTS, goes_on=goes_on)
        )
        time.sleep(2)
        yield
        counts = running.result()
    phase.note("requests", counts["sent"])
    phase.note("answered", counts["whole"] + counts["stream"])
    phase.note("refused with 503", counts["503"])
    phase.note("cut, which their clients saw", counts["lost"] + counts["500"])
    heard = counts["lost"] + sum(counts[how] for how in ENDED)
    phase.at_most("clients that heard nothing", counts["sent"] - heard, 0)
    phase.at_most("wrong answers", len(storm.different), 1)


def seconds_to_end(processes: list[psutil.Process], began: float) -> float:
    """Seconds from ``began`` until all of them have gone; 60 if they do not."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while any(map(lives, processes)) and time.monotonic() - began < 60:
        time.sleep(0.05)
    return round(time.monotonic() - began, 1)


@pytest.mark.parametrize(
    ("title", "status", "disk"),
    [
        ("sglang::scheduler", 1, "free"),
        ("sglang::detokenizer", 1, "full"),
        ("tokenizer and HTTP", -9, "free"),
    ],
)
def test_kill_9(
    title: str,
    status: int,
    disk: str,
    started: Callable[[Path], Storm],
    table: Table,
    tmp_path: Path,
) -> None:
    storm = started(tmp_path / "log")
    server = storm.server
    processes = processes_of(server)
    victim = processes[0] if status == -9 else process_named(server, title)
    with table.phase(NAME, f"kill -9 of {title}, {disk} disk") as phase:
        with (
            no_room_for_files(server) if disk == "full" else nullcontext(),
            under_load(storm, phase, lambda: server.process.poll() is None),
        ):
            victim.kill()
            seconds = seconds_to_end(processes, time.monotonic())
            server.process.wait(60)
        phase.equal("exit status", server.process.returncode, status)
        phase.at_most("seconds until all processes have gone", seconds, 10)
        if disk == "free" and status == 1:
            line = server.tail(1)
            start = f"sglang-dllm: error: {title}"
            phase.equal("the last line names it", line.startswith(start), True)


def test_sigterm_with_a_full_disk(
    started: Callable[[Path], Storm], table: Table, tmp_path: Path
) -> None:
    """It refuses new requests, answers those that run, and ends with status 0."""
    storm = started(tmp_path / "log")
    server = storm.server
    processes = processes_of(server)
    size = server.log.stat().st_size
    with table.phase(NAME, "SIGTERM, with the log on a full disk") as phase:
        with (
            no_room_for_files(server),
            under_load(storm, phase, lambda: not storm.counts["503"]),
        ):
            prober = Prober(server.port, 1)
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            time.sleep(0.1)
            late = server.post("/v1/completions", model="demo", prompt="1")
            seconds = seconds_to_end(processes, began)
            server.process.wait(60)
        phase.at_most("requests lost in the drain", storm.counts["lost"], 0)
        phase.equal("status of a late request", late.status_code, 503)
        after = int(late.headers.get("Retry-After", 0))
        phase.at_least("its Retry-After", after, 1)
        phase.note("statuses of /health", ",".join(prober.result().statuses))
        phase.equal("exit status", server.process.returncode, 0)
        phase.at_most("seconds until all processes have gone", seconds, 30)
        phase.at_most("bytes of log written", server.log.stat().st_size - size, 0)
        with pytest.raises(requests.ConnectionError):
            server.post("/v1/completions", model="demo", prompt="1")
