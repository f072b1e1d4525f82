"""Servers of two ranks: they answer as one rank does, and end when a rank fails."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from helpers.launch_ends import ends
from helpers.random_settings import ALGORITHMS, Case
from helpers.serving_harness import Server
from helpers.tiny_checkpoints import LLADA_TOKENS, write_llada
from helpers.token_parity import Kind, Oracle
from reference.models import load
from tools.monitoring.series import Scrape

KIND = Kind("LLaDA", write_llada, LLADA_TOKENS["<|eot_id|>"], cases=1)
SECONDS_TO_END = 30
"""SGLang looks at its processes once a second, and takes five for its diagnosis."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada"), n_kv_heads=2, seed=1)


def start_two(
    start_server: Callable[..., Server], checkpoint: Path, flag: str
) -> Server:
    algorithm = ("--dllm-algorithm", "FullAttnMultiBlock")
    return start_server(checkpoint, *algorithm, "--enable-metrics", flag, "2")


def schedulers(server: Server) -> list[psutil.Process]:
    """The processes of the ranks, in their order."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    names = {" ".join(process.cmdline()): process for process in found}
    return [names[name] for name in sorted(names) if "sglang::scheduler" in name]


def counted(server: Server) -> dict[tuple[str, ...], float]:
    """The requests that each rank has counted."""
    lines = requests.get(f"{server.base_url}/metrics", timeout=30).text.splitlines()
    name = "sglang:dllm_canvas_length_tokens_count"
    return Scrape.of(0, lines).sums(name, ("dp_rank",))


def ask_all(server: Server, cases: list[Case]) -> list[dict[str, Any]]:
    """Ask all at once; answers in the order of the cases."""
    answers: dict[int, dict[str, Any]] = {}

    def ask(index: int) -> None:
        case = cases[index]
        answers[index] = server.generate(list(case.prompt), **case.sampling_params())

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(cases))]


@pytest.mark.parametrize("flag", ["--tp-size", "--dp-size"])
def test_two_ranks_answer_with_the_tokens_of_the_reference(
    flag: str, start_server: Callable[..., Server], checkpoint: Path
) -> None:
    server = start_two(start_server, checkpoint, flag)
    assert len(schedulers(server)) == 2
    oracle = Oracle(KIND, load(checkpoint))
    cases = [case for name in ALGORITHMS for case in oracle.cases(name, 6)]
    server.wait_until_idle()
    # SGLang's own request at the start is one of them.
    before = counted(server)
    equal = [
        oracle.check(case, answer["output_ids"], answer["meta_info"])
        for case, answer in zip(cases, ask_all(server, cases), strict=True)
    ]
    assert sum(equal) >= len(equal) - 1, "too many cases within noise"
    server.wait_until_idle()
    after = counted(server)
    ranks = {rank: num - before.get(rank, 0) for rank, num in after.items()}
    assert sum(ranks.values()) == len(cases), "a request counts once"
    state = requests.get(f"{server.base_url}/dllm/state", timeout=30).json()
    assert state == {"queued": 0, "canvases": []}
    if flag == "--dp-size":
        assert set(ranks) == {("0",), ("1",)}, "each rank counts its own"
        assert all(ranks.values())
        # It is below SGLang's controller, which does not look after it.
        schedulers(server)[1].send_signal(signal.SIGKILL)
        assert server.process.wait(SECONDS_TO_END) == 1
        assert server.tail(1).startswith("sglang-dllm: error: sglang::scheduler_DP")


def test_a_killed_rank_ends_the_launch(
    start_server: Callable[..., Server], checkpoint: Path
) -> None:
    """A request is being decoded: the other rank waits in a collective."""
    server = start_two(start_server, checkpoint, "--tp-size")
    outcome: list[Any] = []

    def ask() -> None:
        try:
            params = {"max_new_tokens": 3000, "temperature": 0, "ignore_eos": True}
            outcome.append(server.post("/generate", text="a", sampling_params=params))
        except requests.RequestException as error:
            outcome.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1)
    schedulers(server)[1].send_signal(signal.SIGKILL)
    assert server.process.wait(SECONDS_TO_END) == 1
    asking.join(SECONDS_TO_END)
    assert isinstance(outcome[0], requests.RequestException), "its connection ends"
    line = server.tail(1)
    assert line.startswith("sglang-dllm: error: sglang::scheduler_TP")
    assert line.endswith("was killed by SIGKILL")


def test_ranks_that_do_not_divide_the_model_end_the_launch_in_one_line(
    checkpoint: Path,
) -> None:
    command = ["--dllm-algorithm", "FullAttnMultiBlock", "--tp-size", "3"]
    ((status, output),) = ends([("--model-path", checkpoint, *command)])
    assert status == 2
    (line,) = [x for x in output.splitlines() if "--tp-size" in x]
    assert line == (
        "sglang-dllm: error: --tp-size=3 does not fit the checkpoint's "
        "num_attention_heads=4; expected 1, 2 or 4"
    )
    assert "Traceback" not in output
