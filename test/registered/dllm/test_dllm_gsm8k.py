"""GSM8K-style accuracy and tokens per forward through the real server.

It asks the demo model its held-out problems by default. A real checkpoint is asked by

    pytest test/registered/dllm --gsm8k-model d3LLM/d3LLM_LLaDA \
        --gsm8k-data test.jsonl --gsm8k-prompt plain --gsm8k-max-new-tokens 256 \
        --gsm8k-min-accuracy 0.70 --gsm8k-min-tpf 8
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.gsm8k import Client, Settings, last_number, read_problems, run
from helpers.serving_harness import Server

# The shipped weights get about 84 % (docs/demo_model.md).
DEMO_ACCURACY = 0.8
DEMO_TOKENS_PER_FORWARD = 2.5
DEMO_OPTIONS = {"threshold": 0.1}


def heldout_file(folder: Path, num: int) -> Path:
    from sglang_dllm.demo.problems import heldout

    file = folder / "heldout.jsonl"
    rows = [{"question": p.question, "answer": p.answer} for p in heldout(num, seed=7)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_accuracy_and_tokens_per_forward(
    request: pytest.FixtureRequest,
    start_server: Callable[..., Server],
    tmp_path: Path,
) -> None:
    def option(name: str) -> Any:
        return request.config.getoption(f"--gsm8k-{name}")

    model, data = option("model"), option("data")
    server = (
        start_server(model, "--dllm-algorithm", option("algorithm"))
        if model
        else request.getfixturevalue("demo_server")
    )
    file = Path(data) if data else heldout_file(tmp_path, option("num"))
    settings = Settings(
        prompt=option("prompt"),
        max_new_tokens=option("max-new-tokens") or (256 if model else 64),
        dllm={} if model else DEMO_OPTIONS,
    )
    problems = read_problems(file, option("num"))
    summary = run(Client(server.base_url), problems, settings, progress=False).summary
    print(summary)
    assert summary.problems == len(problems)
    assert summary.tokens_per_forward is not None, "our server tells its forwards"
    assert summary.accuracy >= (
        option("min-accuracy") or (0 if model else DEMO_ACCURACY)
    )
    assert summary.tokens_per_forward >= (
        option("min-tpf") or (0 if model else DEMO_TOKENS_PER_FORWARD)
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("it costs $1,234.50 in all\n#### 1,234", "1234"),
        ("So the answer is 17.", "17"),
        ("#### -3", "-3"),
        ("nothing", None),
    ],
)
def test_the_number_read_from_an_answer(text: str, number: str | None) -> None:
    assert last_number(text) == number
