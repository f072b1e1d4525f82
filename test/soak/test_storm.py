"""A long random run through one server: nothing leaks, and nobody notices the others.

`make soak` lets it run for SOAK_MINUTES; `make test` for some seconds.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.random_settings import ALGORITHMS, random_case
from helpers.serving_harness import Server
from helpers.storm import Storm, resident_mib
from helpers.tiny_checkpoints import write_llada

BAD_LOG_LINE = re.compile(r"[Mm]em(ory)? [Ll]eak|double free|Traceback|SIGQUIT")
MAX_GROWTH_MIB = 150
"""Between the first quarter of a storm, which fills pools and buffers, and its end."""
MAX_DIFFERENT = 0.005
"""Share of answers that may differ from the answer alone: a forward of a batch rounds
otherwise than a forward of one canvas, which decides the closest of choices."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("storm") / "llada", seed=1)


@pytest.fixture(scope="module", params=["false", "true"], ids="prelaunch={}".format)
def server(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    """A pool in which requests wait for each other; SGLang checks for leaks."""
    file = tmp_path_factory.mktemp("yaml") / "dllm.yaml"
    file.write_text(f"prelaunch: {request.param}\n")
    return start_server(
        checkpoint,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
        *("--max-total-tokens", "1000", "--max-running-requests", "8"),
        env={"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    )


def test_a_storm_leaves_nothing_behind(
    server: Server, request: pytest.FixtureRequest
) -> None:
    minutes: float = request.config.getoption("--soak-minutes")
    seed: int = request.config.getoption("--soak-seed")
    rng = random.Random(seed)
    num_rounds = min(2 + int(minutes), 12)
    cases = [
        random_case(rng, algorithm, "LLaDA", list(range(32, 120)))
        for algorithm in ALGORITHMS
        for _ in range(num_rounds)
    ]
    storm = Storm(server, cases, seed)
    storm.ask_alone()
    storm.run(60 * minutes / 4)
    server.wait_until_idle()
    before = resident_mib(server)
    storm.run(60 * minutes * 3 / 4)
    load = server.wait_until_idle()
    growth = resident_mib(server) - before
    print(f"\n{dict(storm.counts)}, {storm.num_retractions} retractions, "
          f"{before:.0f} MiB and {growth:+.0f} MiB")  # fmt: skip
    assert load["num_used_tokens"] == 0
    assert growth < MAX_GROWTH_MIB
    assert storm.counts["compared"] > len(cases) / 2
    most = 1 + MAX_DIFFERENT * storm.counts["compared"]
    assert len(storm.different) <= most, storm.different[:3]
    assert server.post("/flush_cache").ok
    lines = server.log.read_text(errors="replace").splitlines()
    assert [line for line in lines if BAD_LOG_LINE.search(line)] == []
