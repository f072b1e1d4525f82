"""Decodes as one of two tensor-parallel ranks, without a server.

``python -m helpers.run_rank RANK PORTS JOB.pt OUT``: JOB holds ``Job`` objects, and
each of two processes runs them in turn on its half of each model. The ranks write OUT.0
and OUT.1: for each job the answers of its cases, and logits.
SGLang takes long to import, so that all checkpoints are run in one pair of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmark.in_process import InProcess
from benchmark.server import free_port
from helpers.other_process import environment, leave
from helpers.random_settings import Case
from helpers.run_logits import run_batch
from helpers.run_quantized import install_shadows
from helpers.warm_start import Fork

RANKS = (0, 1)


@dataclass
class Job:
    """A checkpoint and what is computed with it.

    Attributes:
        batches: canvases whose logits are wanted.
        quantized: kernels are replaced by plain torch (``helpers.run_quantized``) for
            this job and all later ones.
    """

    path: str
    flags: tuple[str, ...] = ()
    cases: list[Case] = field(default_factory=list)
    batches: list[list[list[int]]] = field(default_factory=list)
    quantized: bool = False


@dataclass
class Answer:
    """The visible tokens of a case and its report."""

    ids: list[int]
    meta: dict[str, Any]


@dataclass
class Outcome:
    answers: list[Answer]
    logits: list[list[torch.Tensor]]


def start_ranks(jobs: Sequence[Job], folder: Path) -> list[Fork]:
    """Start both ranks. ``outcomes_of`` waits for them."""
    torch.save(list(jobs), folder / "job.pt")
    # A rank may begin the next job while the other one still leaves the last.
    ports = ",".join(str(free_port()) for _ in jobs)
    started = []
    for rank in RANKS:
        args = [str(rank), ports, str(folder / "job.pt"), str(folder / "out")]
        words = ["-m", "helpers.run_rank", *args]
        started.append(Fork(words, folder / f"log.{rank}", env=environment()))
    return started


def outcomes_of(
    ranks: list[Fork], folder: Path, timeout: float = 450
) -> list[list[Outcome]]:
    """The outcomes of all jobs, by rank.

    Raises:
        AssertionError: a rank failed; the message has the end of its output.
    """
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(timeout)
            assert code == 0, (folder / f"log.{rank}").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"out.{r}", weights_only=False) for r in RANKS]


def decode(process: InProcess, cases: list[Case]) -> list[Answer]:
    """Decode all cases. A new one comes with each round while there is room."""
    waiting, requests = list(cases), []
    while waiting or process.requests:
        if waiting:
            case = waiting[0]
            try:
                process.add(
                    case.prompt,
                    case.length,
                    case.algorithm,
                    case.all_options,
                    case.sampling,
                    case.ignore_eos,
                )
            except ValueError:
                assert process.requests, case
            else:
                requests.append(process.requests[-1])
                waiting.pop(0)
        process.run_round()
    return [_answer(request) for request in requests]


def _answer(request: Any) -> Answer:
    (reports,) = request.customized_info.values()
    return Answer(list(request.output_ids), reports.report.to_dict())


def run(job: Job, rank: int, port: str) -> Outcome:
    from sglang.srt.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )
    from transformers import AutoTokenizer

    if job.quantized:
        install_shadows()
    flags = ("--tp-size", str(len(RANKS)), "--nccl-port", port, *job.flags)
    process = InProcess(job.path, *flags, rank=rank)
    tokenizer = AutoTokenizer.from_pretrained(job.path)
    process.facts = process.facts.with_tokenizer(tokenizer)
    process.new_engine()
    answers = decode(process, job.cases)
    logits = [run_batch(process.runner, batch) for batch in job.batches]
    destroy_model_parallel()
    destroy_distributed_environment()
    return Outcome(answers, logits)


def main(rank: str, ports: str, job: str, out: str) -> None:
    jobs = torch.load(job, weights_only=False)
    found = [
        run(one, int(rank), port)
        for one, port in zip(jobs, ports.split(","), strict=True)
    ]
    torch.save(found, f"{out}.{rank}")


if __name__ == "__main__":
    from helpers import run_rank  # so that pickle finds its classes by this name

    run_rank.main(*sys.argv[1:])
    leave()
