"""Storms, floods and faults on servers that live on: nobody notices the others.

`make soak` lets them run for SOAK_MINUTES; `make test` for some seconds.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from helpers.fault_plugin import Faults
from helpers.footprint import Footprint, no_room_for_files, process_named
from helpers.health_probe import Prober, Probes
from helpers.malformed import send_malformed
from helpers.random_settings import storm_cases
from helpers.serving_harness import Server
from helpers.slow_clients import SlowClients
from helpers.soak_table import Budget, Phase, Table
from helpers.storm import CUTS, ENDED, WHOLE, Storm
from helpers.tiny_checkpoints import write_llada
from sglang_dllm.serving.state import PATIENCE

BAD_LOG_LINE = re.compile(r"[Mm]em(ory)? [Ll]eak|double free|Traceback|SIGQUIT")
RUNNING, QUEUED = 8, 24
"""Requests that the server runs and keeps waiting: its capacity."""

MAX_GROWTH_MIB = 150
"""Between the first storm, which fills pools and buffers, and the end."""
MAX_FILES = MAX_THREADS = 8
"""More open files or threads at the end than after the first storm. A leak in any phase
has hundreds; pools of threads grow a little later than the first storm."""
MAX_DIFFERENT = 0.0005
"""Share of answers that may differ from the answer alone: a forward of a batch rounds
otherwise than a forward of one canvas, which decides the closest of choices."""
MEDIAN_HEALTH_MS = 50
MAX_HEALTH_MS = 1000
"""The timeout of Kubernetes' probes: one of them may meet cores that are busy."""


class Soaked:
    """A server that a soak does not end, and what it answers when it is alone.

    Attributes:
        first: what it held after the first storm.
    """

    def __init__(
        self, name: str, server: Server, faults: Faults, budget: Budget
    ) -> None:
        self.name, self.server, self.faults = name, server, faults
        self._budget = budget
        cases = storm_cases(random.Random(budget.seed), 3)
        self.storm = Storm(server, cases, budget.seed)
        self.storm.ask_alone()
        self.first: Footprint | None = None
        self._counted: Counter[str] = Counter()
        self._num_different = self._log_read = 0

    @contextmanager
    def meanwhile(self, seconds: float) -> Iterator[Future[Counter[str]]]:
        """Clients ask during the block, which runs a second after they began."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.storm.run, seconds, WHOLE)
            time.sleep(min(1, seconds / 3))
            yield running

    def check(
        self,
        phase: Phase,
        num_500: int = 0,
        may_refuse: bool = False,
        num_tracebacks: int = 0,
    ) -> None:
        """Ask some more; then nothing may be lost, wrong or held since the last check.

        Args:
            num_500: answers that may have this status.
            may_refuse: whether answers may have status 503.
            num_tracebacks: that the log may have.
        """
        storm = self.storm
        storm.run(self._budget.fixed(1.5), WHOLE)
        counts = storm.counts - self._counted
        self._counted = storm.counts.copy()
        phase.note("requests", counts["sent"])
        lost = counts["sent"] - sum(counts[how] for how in ENDED)
        phase.at_most("lost answers", lost, 0)
        phase.at_most("answers of 500", counts["500"], num_500)
        if not may_refuse:
            phase.at_most("answers of 503", counts["503"], 0)
        different = len(storm.different) - self._num_different
        self._num_different += different
        most = 1 + int(MAX_DIFFERENT * counts["compared"])
        measure = f"wrong answers of {counts['compared']:,} compared"
        phase.at_most(measure, different, most)
        load = self.server.wait_until_idle()
        state = requests.get(self.server.base_url + "/dllm/state", timeout=30).json()
        held = load["num_used_tokens"] + len(state["canvases"])
        phase.at_most("KV slots and canvases at rest", held, 0)
        with self.server.log.open("rb") as log:
            log.seek(self._log_read)
            lines = log.read().decode(errors="replace").splitlines()
            self._log_read = log.tell()
        bad = [line for line in lines if BAD_LOG_LINE.search(line)]
        print(*bad[:20], sep="\n")
        phase.at_most("tracebacks and leaks in the log", len(bad), num_tracebacks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("storm") / "llada", seed=1)


@pytest.fixture(scope="module", params=["false", "true"], ids="prelaunch={}".format)
def soaked(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
    budget: Budget,
) -> Soaked:
    """A pool in which requests wait for each other; SGLang checks for leaks."""
    file = tmp_path_factory.mktemp("yaml") / "dllm.yaml"
    file.write_text(f"prelaunch: {request.param}\n")
    faults = Faults.new(tmp_path_factory.mktemp("faults"))
    server = start_server(
        checkpoint,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
        *("--max-total-tokens", "1000", "--max-running-requests", str(RUNNING)),
        *("--max-queued-requests", str(QUEUED), "--served-model-name", "demo"),
        env={"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", **faults.env},
    )
    return Soaked(f"prelaunch: {request.param}", server, faults, budget)


def note_health(phase: Phase, probes: Probes, budget: Budget) -> None:
    """The milliseconds have bounds where the machine does nothing else."""
    for measure, value, bound in (
        ("median of /health in ms", probes.median, MEDIAN_HEALTH_MS),
        ("worst of /health in ms", probes.worst, MAX_HEALTH_MS),
    ):
        if budget.is_short:
            phase.note(measure, value)
        else:
            phase.at_most(measure, value, bound)


def test_a_storm_changes_nothing(soaked: Soaked, table: Table, budget: Budget) -> None:
    storm = soaked.storm
    with table.phase(soaked.name, "storm") as phase:
        storm.run(budget.seconds(0.03), with_pauses=True)
        soaked.first = Footprint.at_rest(soaked.server, budget.fixed(15))
        storm.run(budget.seconds(0.05), with_pauses=True)
        phase.note("retracting pauses", storm.num_retractions)
        soaked.check(phase)


def test_aborts_at_random_moments(soaked: Soaked, table: Table, budget: Budget) -> None:
    """By ``/abort_request``, and by hanging up."""
    num = budget.count(10_000)
    with table.phase(soaked.name, "aborts") as phase:
        ends = (*CUTS, *CUTS, *WHOLE)
        seconds = budget.seconds(0.26)
        counts = soaked.storm.run(seconds, ends, num_clients=16, num_cuts=num)
        phase.note("aborts by /abort_request", counts["aborted"] + counts["too late"])
        phase.note("of them after the last token", counts["too late"])
        phase.note("connections closed", counts["hang up"])
        soaked.check(phase)


def test_malformed_requests_are_refused(
    soaked: Soaked, table: Table, budget: Budget
) -> None:
    with table.phase(soaked.name, "malformed requests") as phase:
        statuses, bad = send_malformed(
            soaked.server.base_url,
            budget.count(1_000),
            budget.seconds(0.05, 10),
            budget.seed,
        )
        phase.note("sent", sum(statuses.values()))
        for status, times in sorted(statuses.items()):
            phase.note(f"status {status}" if status else "no answer", times)
        print(*bad, sep="\n")
        phase.at_most("status 500 and above, or no answer", len(bad), 0)
        soaked.check(phase)


def test_ten_times_the_capacity(soaked: Soaked, table: Table, budget: Budget) -> None:
    num_clients = 10 * (RUNNING + QUEUED)
    seconds = budget.seconds(0.25)
    with table.phase(soaked.name, "ten times the capacity") as phase:
        prober = Prober(soaked.server.port, seconds)
        counts = soaked.storm.run(seconds, WHOLE, num_clients=num_clients)
        probes = prober.result()
        phase.note("seconds", seconds)
        phase.note("clients at once", num_clients)
        phase.note("answered", counts["whole"] + counts["stream"])
        phase.at_least("refused with 503", counts["503"], 1)
        unsaid = counts["503 without Retry-After"]
        phase.at_most("refused without Retry-After", unsaid, 0)
        soaked.check(phase, may_refuse=True)
        phase.note("health probes", len(probes.milliseconds))
        phase.equal("their statuses", ",".join(probes.statuses), "200")
        note_health(phase, probes, budget)


def test_slow_and_vanished_clients(
    soaked: Soaked, table: Table, budget: Budget
) -> None:
    body = {
        "input_ids": [40, 41],
        "stream": True,
        "sampling_params": {
            "max_new_tokens": 96,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"dllm": {"algorithm": "LLaDA", "stream": "draft"}},
        },
    }
    seconds = budget.fixed(10)
    with table.phase(soaked.name, "slow, unread and vanished clients") as phase:
        clients = SlowClients(soaked.server.port, body, num_each=4)
        phase.note("such clients", clients.num)
        with soaked.meanwhile(seconds):
            clients.read(seconds)
        clients.close()
        soaked.check(phase)


def test_a_full_disk(
    soaked: Soaked, table: Table, budget: Budget, tmp_path: Path
) -> None:
    """The log and the dumps that an operator asked for find no room."""
    server = soaked.server
    on = {"log_requests": True, "log_requests_level": 3, "dump_requests_threshold": 1}
    off = {"log_requests": False, "dump_requests_folder": ""}
    with table.phase(soaked.name, "full disk") as phase:
        dumps = str(tmp_path / "dumps")
        answer = server.post("/configure_logging", dump_requests_folder=dumps, **on)
        phase.equal("logs and dumps of requests are on", answer.status_code, 200)
        size = server.log.stat().st_size
        with no_room_for_files(server):
            soaked.storm.run(budget.fixed(4), WHOLE)
            phase.at_most("bytes of log written", server.log.stat().st_size - size, 0)
        server.post("/configure_logging", **off)
        soaked.check(phase)


@pytest.mark.parametrize("title", ["sglang::scheduler", "sglang::detokenizer"])
def test_a_stopped_process(
    soaked: Soaked, table: Table, budget: Budget, title: str
) -> None:
    """Nobody can tell it from a long forward; docs/launch.md says what probes see."""
    process = process_named(soaked.server, title)
    with table.phase(soaked.name, f"SIGSTOP, SIGCONT of {title}") as phase:
        with soaked.meanwhile(budget.fixed(6)):
            process.send_signal(signal.SIGSTOP)
            try:
                probes = Prober(soaked.server.port, budget.fixed(3)).result()
                begin = time.monotonic()
                url = soaked.server.base_url + "/dllm/state"
                state = requests.get(url, timeout=30).status_code
                seconds = round(time.monotonic() - begin, 1)
                status = process.status()
            finally:
                process.send_signal(signal.SIGCONT)
        phase.equal("its state", status, psutil.STATUS_STOPPED)
        phase.equal("/health while it is stopped", ",".join(probes.statuses), "200")
        note_health(phase, probes, budget)
        # The answer to it does not pass through the detokenizer.
        wanted = 503 if title == "sglang::scheduler" else 200
        phase.equal("/dllm/state while it is stopped", state, wanted)
        phase.at_most("seconds of /dllm/state", seconds, 2 * PATIENCE)
        soaked.check(phase)


@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_jumps(
    soaked: Soaked, table: Table, budget: Budget, hours: int
) -> None:
    """``time.time`` of all processes; the monotonic clocks go on, as on a machine."""
    with table.phase(soaked.name, f"clock jumps by {hours:+} h") as phase:
        with soaked.meanwhile(budget.fixed(3)):
            soaked.faults.shift_clocks(3600 * hours)
        body = {"model": "demo", "prompt": "1", "max_tokens": 4}
        created = soaked.server.post("/v1/completions", **body).json()["created"]
        shift = round((created - time.time()) / 3600)
        phase.equal("hours that the server is off", shift, hours)
        soaked.faults.shift_clocks(0)
        soaked.check(phase)


def test_no_memory_in_a_forward(soaked: Soaked, table: Table, budget: Budget) -> None:
    """The requests of that forward get 500, and the others are served."""
    with table.phase(soaked.name, "out of memory in a forward") as phase:
        seconds, num = budget.fixed(12) + 2, 0
        deadline = time.monotonic() + seconds - 1
        with soaked.meanwhile(seconds) as running:
            while time.monotonic() < deadline:
                soaked.faults.out_of_memory()
                while soaked.faults.is_memory_due and not running.done():
                    time.sleep(0.01)
                num += not soaked.faults.is_memory_due
                time.sleep(0.4)
        counts = running.result()
        phase.at_least("forwards without memory", num, 1)
        phase.at_least("their requests, which got 500", counts["500"], num)
        phase.at_least("other requests", counts["whole"] + counts["stream"], num)
        # The last fault may meet a forward of these requests.
        most = num + 1
        soaked.check(phase, num_500=most * RUNNING, num_tracebacks=most)


def test_nothing_has_grown(soaked: Soaked, table: Table, budget: Budget) -> None:
    storm, server, first = soaked.storm, soaked.server, soaked.first
    assert first is not None, "the first storm was left out"
    with table.phase(soaked.name, "growth since the first storm") as phase:
        last = Footprint.at_rest(server, budget.fixed(15))
        phase.note("requests by then", storm.counts["sent"])
        phase.note("answers compared", storm.counts["compared"])
        phase.note("answers that differ", len(storm.different))
        phase.note("memory after the first storm in MiB", round(first.mib))
        growth = round(last.mib - first.mib)
        phase.at_most("memory, growth in MiB", growth, MAX_GROWTH_MIB)
        phase.at_most("open files, growth", last.files - first.files, MAX_FILES)
        phase.at_most("threads, growth", last.threads - first.threads, MAX_THREADS)
        status = server.post("/flush_cache").status_code
        phase.equal("status of /flush_cache", status, 200)
