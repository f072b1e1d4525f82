"""What the speed benchmarks share: a server of their own, prompts, requests, ratios."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import urllib3

ROOT = Path(__file__).parents[1]
MAX_CONNECTIONS = 256
sys.path.insert(0, str(ROOT / "test"))

from gsm8k_problems import BenchmarkError  # noqa: E402
from helpers.serving_harness import Server  # noqa: E402


@dataclass(frozen=True)
class Reply:
    ids: list[int]
    forwards: int
    seconds: float
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def dllm(self) -> dict[str, Any] | None:
        """What the server says it decoded with."""
        return self.meta.get("dllm")


Ask = Callable[[list[int]], Reply]


@contextmanager
def local_server(model_path: str, algorithm: str, *flags: str) -> Iterator[Server]:
    """A server on a free port, stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = Server(model_path, ["--dllm-algorithm", algorithm, *flags], log)
        try:
            yield server.wait_until_ready()
        finally:
            server.stop()


def server_ask(
    base_url: str,
    dllm: dict[str, Any],
    answer_len: int | None = None,
    canvas_len: int | None = None,
) -> Ask:
    """Asks ``/generate`` greedily.

    Args:
        dllm: the request's algorithm and options.
        answer_len: tokens behind the prompt.
        canvas_len: of both together, instead.
    """
    assert (answer_len is None) != (canvas_len is None)
    # As OpenAI's client does: connections are kept, as many as are used at once. A
    # light one, since what a client takes of a core is counted as the server's.
    pool = urllib3.PoolManager(maxsize=MAX_CONNECTIONS, retries=False, timeout=600)

    def ask(prompt: list[int]) -> Reply:
        sampling = {
            "max_new_tokens": answer_len or max(1, (canvas_len or 0) - len(prompt)),
            "temperature": 0,
            "custom_params": {"dllm": dllm},
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
    """The replies in order, and the seconds until the last one."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(ask, prompts))
    return replies, time.perf_counter() - began


def heldout_questions(num: int) -> list[str]:
    """Held-out problems of the demo model, the same ones every time."""
    from sglang_dllm.demo.evaluate import heldout

    return [problem.question for problem in heldout(num, seed=7)]


def chat_prompts(model_path: str, questions: Sequence[str]) -> list[list[int]]:
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
    """The process that runs the model."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if "sglang::scheduler" in " ".join(process.cmdline()):
            return process
    raise BenchmarkError("the server has no scheduler process")


def cpu_seconds(process: psutil.Process) -> float:
    """Of all its threads, so far; the kernel counts hundredths of seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def median_ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """The median of each round's ratio: what slows down one round slows down both."""
    return median(a / b for a, b in zip(ours, base, strict=True))


def run_command(
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    args: argparse.Namespace,
    problem: Callable[[dict[str, Any]], str | None] = lambda figures: None,
) -> int:
    """Measure, print, write ``args.json``. What fails is one line and status 1.

    Args:
        problem: what is wrong with the figures, where something is.
    """
    try:
        figures = measure(args)
    except (BenchmarkError, RuntimeError, OSError, ValueError) as error:
        # Of a server that did not start, the last line of its log says why.
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"{name}: {lines[-1]}", file=sys.stderr)
        return 1
    print(show(figures), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    wrong = problem(figures)
    if wrong:
        print(f"{name}: {wrong}", file=sys.stderr)
    return 1 if wrong else 0
