"""GSM8K-style accuracy, tokens per forward and speed of a running server.

    python benchmark/gsm8k.py --base-url http://127.0.0.1:30000 --data test.jsonl \
        --algorithm FastDLLM --sweep threshold=0.5,0.7,0.9 \
        --json OUT.json --plot OUT.png

The data file has one JSON object a line with ``question`` and ``answer``, the answer
ending in ``#### N``, like GSM8K's own files. Works with any server of the OpenAI
protocol; forwards, and with them TPF, are known from our own. See docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

import gsm8k_report as report
from gsm8k_client import Client, Sampling
from gsm8k_figures import Answer, Summary, count_tokens, summarise
from gsm8k_problems import (
    EXTRACTORS,
    PROMPT_FORMS,
    BenchmarkError,
    Problem,
    build_prompt,
    cut_at_stops,
    last_number,
    read_problems,
)
from gsm8k_store import Store, digest

__all__ = ["Client", "Settings", "last_number", "main", "read_problems", "run"]


@dataclass(frozen=True)
class Settings:
    """What decides the answers, and the concurrency that decides their times."""

    prompt: str = "chat"
    shots: tuple[Problem, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0
    seed: int | None = None
    ignore_eos: bool = False
    dllm: dict[str, Any] = field(default_factory=dict)
    # "server": the request ends at a stop string; "client": the text is cut
    # afterwards, as the published harnesses do, and all forwards count.
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
    summary: Summary
    answers: list[Answer]
    # The dllm values the server used, where it says so.
    effective: dict[str, Any] | None


def ask(
    client: Client, index: int, problem: Problem, settings: Settings
) -> tuple[Answer, dict[str, Any] | None]:
    form, sampling = PROMPT_FORMS[settings.prompt], settings.sampling
    prompt = build_prompt(form, settings.shots, problem.question)
    began, clock = time.time(), time.perf_counter()
    reply = client.ask(prompt, sampling)
    seconds = time.perf_counter() - clock
    tokenizer = client.tokenizer
    eos_id = tokenizer.eos_token_id if tokenizer else None
    text, visible = reply.text, reply.tokens
    if sampling.ignore_eos and reply.ids is not None and eos_id in reply.ids:
        # The whole canvas came back; what a reader gets is before the first EOS.
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
    """Ask every problem not answered yet, the first ``warmup`` of them first."""
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


class OneLineParser(argparse.ArgumentParser):
    """Bad arguments: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text: 0.5, true, low_confidence."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not (key.strip() and sign and value.strip()):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    return key.strip(), _value(value.strip())


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    key, sign, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not (key.strip() and sign and all(parts)):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,VALUE,…, found {text!r}")
    if len(set(parts)) != len(parts):
        raise argparse.ArgumentTypeError(f"a value comes twice in {text!r}")
    return key.strip(), [_value(part) for part in parts]


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers, found {text!r}") from None


def at_least(low: float, kind: type, high: float = float("inf")) -> Any:
    def read(text: str) -> Any:
        wanted = "an integer" if kind is int else "a number"
        span = f"from {low:g}" + (f" to {high:g}" if high < float("inf") else "")
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected {wanted} {span}, found {text!r}"
            )
        return value

    return read


def build_parser() -> argparse.ArgumentParser:
    count, share = at_least(1, int), at_least(0, float, 1)
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000")
    add("--data", type=Path, required=True, help="JSONL of question and answer")
    add("--api", choices=["auto", "native", "openai"], default="auto")
    add("--model", help="the name to ask for; default: what the server serves")
    add("--tokenizer", help="folder or id, for the counts of re-tokenised text")
    add("--num", type=count, help="only the first N problems")
    add("--prompt", choices=list(PROMPT_FORMS), default="chat")
    add("--shots", type=at_least(0, int), default=0, help="worked examples")
    add("--shots-data", type=Path, help="JSONL they are the first ones of")
    add("--algorithm", help="dllm algorithm; default: the server's")
    add("--option", type=parse_option, action="append", default=[], metavar="KEY=VALUE")
    add("--sweep", type=parse_sweep, metavar="KEY=V1,V2,…", help="one run a value")
    add("--max-new-tokens", type=count, default=256)
    add("--temperature", type=at_least(0, float), default=0.0)
    add("--seed", type=_seeds, default=[None], metavar="N[,N…]", help="one run a seed")
    add("--ignore-eos", action="store_true", help="decode the whole canvas")
    add("--stop-at", choices=["server", "client"], default="server")
    add("--extract", choices=list(EXTRACTORS), default="last")
    add("--concurrency", type=count, default=8)
    add("--warmup", type=at_least(0, int), default=0, help="first N: accuracy only")
    add("--timeout", type=at_least(1, float), default=600.0, help="seconds a request")
    add("--json", type=Path, help="write figures; answers go to OUT.answers.jsonl")
    add("--fresh", action="store_true", help="forget the answers of earlier runs")
    add("--plot", type=Path, help="draw accuracy against TPF")
    add("--aup-best", type=at_least(0, float, 100), metavar="PERCENT")
    add("--min-accuracy", type=share, help="0 to 1; below it the exit status is 1")
    add("--min-tpf", type=at_least(0, float), help="likewise for tokens per forward")
    return parser


def missed_gates(
    runs: Sequence[report.Run], min_accuracy: float | None, min_tpf: float | None
) -> list[str]:
    missed = []
    for one in runs:
        accuracy, tpf = one.summary.accuracy, one.summary.tokens_per_forward
        if min_accuracy is not None and accuracy < min_accuracy:
            missed.append(f"{one.title}: accuracy {accuracy:.4f} < {min_accuracy:g}")
        if min_tpf is not None and tpf is None:
            missed.append(f"{one.title}: the server does not tell its forwards")
        elif min_tpf is not None and tpf is not None and tpf < min_tpf:
            missed.append(f"{one.title}: TPF {tpf:.3f} < {min_tpf:g}")
    return missed


def measure(args: argparse.Namespace) -> list[report.Run]:
    """All runs of a command line, printed as they end."""
    problems = read_problems(args.data, args.num)
    if args.warmup >= len(problems):
        raise BenchmarkError(
            f"--warmup {args.warmup} leaves none of {len(problems)} problems"
        )
    shots: list[Problem] = []
    if args.shots:
        if args.shots_data is None:
            raise BenchmarkError("--shots needs --shots-data FILE")
        shots = read_problems(args.shots_data, args.shots)
        if len(shots) < args.shots:
            raise BenchmarkError(f"{args.shots_data} has {len(shots)} problems only")
    options = dict(args.option)
    if args.algorithm:
        options["algorithm"] = args.algorithm
    key, values = args.sweep or (None, [None])
    if key in options:
        raise BenchmarkError(f"{key} is given twice: by --sweep and by --option")
    client = Client(
        args.base_url,
        args.api,
        model=args.model,
        tokenizer=args.tokenizer,
        timeout=args.timeout,
    )
    path = args.json and args.json.with_suffix(".answers.jsonl")
    if path and args.fresh:
        path.unlink(missing_ok=True)
    store, runs = Store(path), []
    for value in values:
        for seed in args.seed:
            settings = Settings(
                prompt=args.prompt,
                shots=tuple(shots),
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=seed,
                ignore_eos=args.ignore_eos,
                dllm=options if key is None else {**options, key: value},
                stop_at=args.stop_at,
                extract=args.extract,
                concurrency=args.concurrency,
            )
            label = None if key is None else f"{key}={value}"
            outcome = run(
                *(client, problems, settings),
                **{"warmup": args.warmup, "store": store, "title": label or ""},
            )
            shown = {**asdict(settings), "model": client.model, "api": client.api}
            shown |= {"shots": len(shots), "warmup": args.warmup}
            runs.append(
                report.Run(label, seed, shown, outcome.effective, outcome.summary)
            )
            print(report.text(runs[-1]), flush=True)
            if args.json:
                report.write_json(args.json, runs, args.aup_best)
    summed = report.sweep_text(runs, args.aup_best)
    if summed:
        print(summed)
    if args.plot:
        title = args.algorithm or client.model
        title += f", labels: {key}" if key else ""
        report.draw(args.plot, runs, title)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        runs = measure(args)
    except BenchmarkError as error:
        print(f"gsm8k.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; the same command goes on from here" if args.json else ""
        print(f"gsm8k.py: stopped{kept}", file=sys.stderr)
        return 130
    missed = missed_gates(runs, args.min_accuracy, args.min_tpf)
    if missed:
        print(f"gsm8k.py: missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
