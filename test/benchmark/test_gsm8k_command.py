"""The GSM8K benchmark's command line, against a small server of the OpenAI protocol."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.gsm8k import cli
from benchmark.speed import compare_plain_loop
from helpers.http_stub import StubHandler, StubServer


class Fake(StubServer):
    """A server that answers every question with `#### 4` in 6 tokens, 3 forwards.

    It has the OpenAI routes only, unless `native` is set.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.native = False
        self.fails_after = math.inf
        self.busy = 0

        class Handler(StubHandler):
            def do_GET(handler) -> None:
                known = {"/v1/models": {"data": [{"id": "fake"}]}}
                if self.native:
                    known["/model_info"] = {"model_path": "/fake"}
                body = known.get(handler.path)
                handler.reply(404 if body is None else 200, body)

            def do_POST(handler) -> None:
                body = handler.body()
                if self.busy:
                    self.busy -= 1
                    handler.reply(429, {"error": "busy"})
                    return
                if len(self.asked) >= self.fails_after:
                    handler.reply(400, {"error": {"message": "no\nmore"}})
                    return
                self.asked.append(body)
                text = {"message": {"content": "#### 4"}, "text": "#### 4"}
                usage = {"completion_tokens": 6}
                meta = {**usage, "num_forwards": 3, "dllm": {"algorithm": "A"}}
                if handler.path == "/generate":
                    handler.reply(200, {"text": "#### 4", "meta_info": meta})
                else:
                    handler.reply(200, {"choices": [text], "usage": usage})

        super().__init__(Handler)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


@pytest.fixture
def benchmark(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``benchmark(*arguments)``: exit status and the last line of standard error."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{n}+2?", "answer": f"#### {n + 2}"} for n in range(6)]
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def go(*arguments: str) -> tuple[int, str]:
        common = ["--base-url", fake.base_url, "--data", str(data)]
        status = cli.main([*common, "--concurrency", "1", *arguments])
        return status, capsys.readouterr().err.strip().splitlines()[-1]

    return go


def test_any_openai_server(fake: Fake, benchmark: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    status, _ = benchmark("--json", str(out), "--num", "4", "--seed", "3")
    assert status == 0
    (run,) = json.loads(out.read_text())["runs"]
    summary = run["summary"]
    assert (summary["problems"], summary["right"], summary["tokens"]) == (4, 1, 24)
    assert summary["forwards"] is None and run["settings"]["model"] == "fake"
    body = fake.asked[0]
    assert body["messages"] == [{"role": "user", "content": "0+2?"}]
    assert (body["model"], body["seed"], body["max_tokens"]) == ("fake", 3, 256)
    assert "custom_params" not in body and "stop" not in body


def test_a_raw_prompt_and_options(fake: Fake, benchmark: Any) -> None:
    options = ["--algorithm", "FastDLLM", "--option", "block_size=8"]
    benchmark("--prompt", "plain", "--num", "1", *options)
    (body,) = fake.asked
    assert body["prompt"] == "Q: 0+2?\nA: Let's think step by step."
    assert body["stop"] == ["Q:", "</s>", "<|im_end|>"]
    assert body["custom_params"] == {"dllm": {"algorithm": "FastDLLM", "block_size": 8}}
    benchmark("--prompt", "plain", "--num", "1", "--stop-at", "client")
    assert "stop" not in fake.asked[1]


def test_a_rerun_asks_only_what_is_missing(
    fake: Fake, benchmark: Any, tmp_path: Path
) -> None:
    keep = ["--json", str(tmp_path / "out.json")]
    fake.fails_after = 4
    status, error = benchmark(*keep)
    assert status == 1 and error.endswith("answered 400: no more")
    assert len(fake.asked) == 4
    fake.fails_after = math.inf
    assert benchmark(*keep)[0] == 0
    assert len(fake.asked) == 6
    assert benchmark(*keep)[0] == 0
    assert len(fake.asked) == 6
    # Another setting is another question; --fresh asks all again.
    benchmark(*keep, "--max-new-tokens", "64")
    assert len(fake.asked) == 12
    benchmark(*keep, "--fresh")
    assert len(fake.asked) == 18


def test_a_busy_server_is_asked_again(
    fake: Fake, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.gsm8k.client.time.sleep", lambda _: None)
    fake.busy = 2
    assert benchmark("--num", "1")[0] == 0
    fake.busy = 99
    status, error = benchmark("--num", "1")
    assert status == 1 and "429" in error


def test_a_sweep_and_its_chart(fake: Fake, benchmark: Any, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    status, _ = benchmark("--sweep", "threshold=0.2,0.4", "--plot", str(chart))
    assert status == 0
    asked = [body["custom_params"]["dllm"]["threshold"] for body in fake.asked]
    assert asked == [0.2] * 6 + [0.4] * 6
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_gates(fake: Fake, benchmark: Any) -> None:
    # One of six is right; an autoregressive server tells no forwards.
    assert benchmark("--min-accuracy", "0.16")[0] == 0
    status, error = benchmark("--min-accuracy", "0.17")
    assert status == 1 and "accuracy 0.1667 < 0.17" in error
    status, error = benchmark("--min-tpf", "1")
    assert status == 1 and "does not tell its forwards" in error


def test_our_own_server_tells_forwards(
    fake: Fake, benchmark: Any, tmp_path: Path
) -> None:
    fake.native = True
    out = tmp_path / "out.json"
    asked = ["--prompt", "plain", "--json", str(out), "--algorithm", "A", "--seed", "7"]
    assert benchmark(*asked, "--min-tpf", "2")[0] == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["summary"]["forwards"] == 18
    assert run["summary"]["tokens_per_forward"] == 2
    assert run["effective"] == {"algorithm": "A"}
    sampling = fake.asked[0]["sampling_params"]
    assert (sampling["sampling_seed"], sampling["max_new_tokens"]) == (7, 256)
    assert sampling["custom_params"] == {"dllm": {"algorithm": "A"}}
    status, error = benchmark(*asked, "--min-tpf", "2.1")
    assert status == 1 and "TPF 2.000 < 2.1" in error
    assert len(fake.asked) == 6
    status, error = benchmark("--prompt", "chat")
    assert status == 1 and "--tokenizer DIR or --api openai" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmup", "6"], "leaves none of 6"),
        (["--shots", "2"], "--shots-data"),
        (["--api", "native"], "use --api openai"),
        (["--option", "steps=1", "--sweep", "steps=1,2"], "given twice"),
        (["--base-url", "http://127.0.0.1:1"], "no server at"),
        (["--tokenizer", "/nowhere"], "cannot load the tokenizer"),
    ],
)
def test_what_cannot_run_says_why(
    benchmark: Any, arguments: list[str], message: str
) -> None:
    status, error = benchmark(*arguments)
    assert status == 1 and message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sweep", "threshold"],
        ["--sweep", "=1,2"],
        ["--sweep", "threshold=1,,2"],
        ["--sweep", "threshold=1,1"],
        ["--option", "threshold"],
        ["--option", "threshold="],
        ["--num", "0"],
        ["--concurrency", "x"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--min-accuracy", "70"],
        ["--seed", "1,b"],
        ["--api", "rest"],
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--data", "unread.jsonl", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and arguments[0] in error


DOCS = Path(__file__).parents[2] / "docs"


def documented_commands(module: str) -> list[list[str]]:
    """The arguments of every command line of that module in docs/."""
    text = "\n".join(file.read_text() for file in sorted(DOCS.glob("*.md")))
    lines = text.replace("\\\n", " ").splitlines()
    start = f"python -m benchmark.{module} "
    return [
        shlex.split(line.removeprefix(start), comments=True)
        for line in lines
        if line.startswith(start)
    ]


def test_documented_commands_are_understood() -> None:
    from reference.algorithms import DEFAULTS

    commands = documented_commands("gsm8k")
    assert len(commands) >= 10
    for command in commands:
        args = cli.build_parser().parse_args(command)
        used = {key for key, _ in [*args.option, *([args.sweep] if args.sweep else [])]}
        known = [f.get(args.algorithm, {}).keys() for f in DEFAULTS.values()]
        assert not used or any(used <= keys for keys in known), command
    for command in documented_commands("speed.compare_plain_loop"):
        compare_plain_loop.build_parser().parse_args(command)
