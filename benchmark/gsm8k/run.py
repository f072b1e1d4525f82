"""Asks a server all problems and judges its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tqdm import tqdm

from benchmark.gsm8k.client import Client, Sampling
from benchmark.gsm8k.figures import Answer, Summary, count_tokens, summarise
from benchmark.gsm8k.problems import (
    EXTRACTORS,
    PROMPT_FORMS,
    Problem,
    build_prompt,
    cut_at_stops,
)
from benchmark.gsm8k.store import Store, digest


@dataclass(frozen=True)
class Settings:
    """The settings of a run. All of them but ``concurrency`` decide the answers.

    Attributes:
        stop_at: "server" ends a request at a stop string. "client" cuts the text
            afterwards, as the published harnesses do, so that all forwards count.
    """

    prompt: str = "chat"
    shots: tuple[Problem, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0
    seed: int | None = None
    ignore_eos: bool = False
    dllm: dict[str, Any] = field(default_factory=dict)
    stop_at: str = "server"
    extract: str = "last"
    concurrency: int = 8

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            stops=PROMPT_FORMS[self.prompt].stops if self.stop_at == "server" else (),
            dllm=self.dllm,
        )


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        effective: the ``dllm`` values that the server says it used.
    """

    summary: Summary
    answers: list[Answer]
    effective: dict[str, Any] | None


def ask(
    client: Client, index: int, problem: Problem, settings: Settings
) -> tuple[Answer, dict[str, Any] | None]:
    """The judged answer of one problem, and the server's ``dllm`` values."""
    form, sampling = PROMPT_FORMS[settings.prompt], settings.sampling
    prompt = build_prompt(form, settings.shots, problem.question)
    began, clock = time.time(), time.perf_counter()
    reply = client.ask(prompt, sampling)
    seconds = time.perf_counter() - clock
    tokenizer = client.tokenizer
    eos_id = tokenizer.eos_token_id if tokenizer else None
    text, visible = reply.text, reply.tokens
    if sampling.ignore_eos and reply.ids is not None and eos_id in reply.ids:
        # The reply is the whole canvas. A reader sees the part before the first EOS.
        visible = reply.ids.index(eos_id)
        text = tokenizer.decode(reply.ids[:visible], skip_special_tokens=True)
    text = cut_at_stops(text, form.stops)
    counts = count_tokens(
        visible=visible,
        canvas=sampling.max_new_tokens,
        ids=reply.ids,
        text=reply.text,
        stops=form.stops,
        eos_id=eos_id,
        encode=tokenizer and (lambda t: tokenizer.encode(t, add_special_tokens=False)),
        decode=tokenizer and tokenizer.decode,
    )
    answer = Answer(
        index=index,
        text=text,
        right=EXTRACTORS[settings.extract](text) == problem.target,
        tokens=visible,
        forwards=reply.forwards,
        canvas_len=reply.canvas_len,
        began=began,
        seconds=seconds,
        counts=counts,
    )
    return answer, reply.dllm


def run(
    client: Client,
    problems: Sequence[Problem],
    settings: Settings,
    *,
    warmup: int = 0,
    store: Store | None = None,
    title: str = "",
    progress: bool = True,
) -> Outcome:
    """Ask every problem that the store has no answer of.

    Args:
        warmup: the first problems, which are asked first and count for accuracy only.
    """
    store = store or Store(None)
    key = digest([client.identity, asdict(settings)])
    digests = [digest(asdict(problem)) for problem in problems]
    done = [store.get(key, i, digests[i]) for i in range(len(problems))]
    todo = [i for i, answer in enumerate(done) if answer is None]
    phases = [[i for i in todo if i < warmup], [i for i in todo if i >= warmup]]
    right = sum(answer.right for answer in done if answer)
    bar = tqdm(
        total=len(problems),
        initial=len(problems) - len(todo),
        desc=title or None,
        disable=not progress,
    )
    pool = ThreadPoolExecutor(settings.concurrency)
    try:
        for phase in phases:
            waiting = [
                pool.submit(ask, client, i, problems[i], settings) for i in phase
            ]
            for future in as_completed(waiting):
                answer, dllm = future.result()
                store.add(key, digests[answer.index], answer, dllm)
                done[answer.index] = answer
                right += answer.right
                bar.update()
                bar.set_postfix(right=right)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    answers = [
        replace(answer, warmup=i < warmup) for i, answer in enumerate(done) if answer
    ]
    return Outcome(summarise(answers), answers, store.effective(key))
