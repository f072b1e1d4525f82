"""lm-eval, with its own OpenAI-compatible clients, against our server.

The answers it collects must be those of benchmark.gsm8k on our native route.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmark.gsm8k import Client, Settings, read_problems, run
from helpers.serving_harness import Server
from sglang_dllm.demo.problems import problems

pytest.importorskip("lm_eval")

TASKS = Path(__file__).parents[2] / "benchmark" / "lm_eval"
NUM = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lm_eval") / "problems.jsonl"
    chosen = islice(problems(7, "heldout"), NUM)
    rows = [{"question": p.question, "answer": p.answer} for p in chosen]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def lm_eval(
    server: Server,
    data: Path,
    out: Path,
    *,
    model: str,
    route: str,
    task: str,
    **more: Any,
) -> tuple[dict[str, float], list[str]]:
    """The task's figures and its raw responses, in the problems' order."""
    model_args = {
        "model": "demo",
        "base_url": f"{server.base_url}/v1/{route}",
        "num_concurrent": 4,
        "tokenizer_backend": None,
        "max_retries": 1,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model),
        *("--model_args", json.dumps(model_args)),
        *("--include_path", str(TASKS), "--tasks", task),
        *("--metadata", json.dumps({"data": str(data)})),
        *("--output_path", str(out), "--log_samples"),
    ]
    if route == "chat/completions":
        command.append("--apply_chat_template")
    if more:
        command += ["--gen_kwargs", json.dumps(more)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        command, cwd=out, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    texts = {row["doc_id"]: row["resps"][0][0] for row in rows}
    figures = json.loads(results.read_text())["results"][task]
    return figures, [texts[i] for i in range(NUM)]


def test_chat_completions(demo_server: Server, data: Path, tmp_path: Path) -> None:
    figures, texts = lm_eval(
        demo_server,
        data,
        tmp_path,
        model="local-chat-completions",
        route="chat/completions",
        task="demo_word_problems",
    )
    client, asked = Client(demo_server.base_url), read_problems(data)
    ours = run(client, asked, Settings(max_new_tokens=64), progress=False)
    assert texts == [answer.text for answer in ours.answers]
    assert all(texts), texts
    right = [
        text.rpartition("#### ")[2] == problem.target
        for text, problem in zip(texts, asked, strict=True)
    ]
    assert figures["exact_match,marked"] == pytest.approx(sum(right) / NUM)


def test_completions_with_an_algorithm(
    demo_server: Server, data: Path, tmp_path: Path
) -> None:
    """A request's own options pass through --gen_kwargs."""
    dllm = {"algorithm": "FastDLLM", "threshold": 0.6}
    figures, texts = lm_eval(
        demo_server,
        data,
        tmp_path,
        model="local-completions",
        route="completions",
        task="gsm8k_cot_zeroshot_local",
        max_gen_toks=64,
        custom_params={"dllm": dllm},
    )
    client, asked = Client(demo_server.base_url), read_problems(data)
    settings = Settings(
        prompt="plain", extract="flexible", max_new_tokens=64, dllm=dllm
    )
    ours = run(client, asked, settings, progress=False)
    assert texts == [answer.text for answer in ours.answers]
    accuracy = figures["exact_match,flexible-extract"]
    assert accuracy == pytest.approx(ours.summary.accuracy)
    assert ours.effective is not None
    assert {key: ours.effective[key] for key in dllm} == dllm
