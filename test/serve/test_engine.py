"""``sglang.Engine`` gives what the HTTP server gives, and so does a paged pool."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.serving_harness import Server
from helpers.warm_start import run_python
from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import problems

DEMO = demo_path()
FIELDS = ("num_forwards", "num_committed_tokens", "canvas_len", "tokens_per_forward")
LENGTHS = [64, 1, 32, 100, 17, 200, 96, 48]
LONG = 5
"""Index of the request that is also streamed."""


def word_problems() -> list[list[int]]:
    """Prompts the demo model answers, as a chat would send them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in islice(problems(11, "heldout"), len(LENGTHS))
    ]


PROMPTS = word_problems()

# An offline program as its users write it: the guard is needed, as SGLang starts its
# processes by spawning.
SCRIPT = """
import json, sys, time
import sglang

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    engine = sglang.Engine(
        model_path=job["model_path"],
        dllm_algorithm="FullAttnMultiBlock",
        log_level="error",
        **job["flags"],
    )
    alone = [
        engine.generate(input_ids=ids, sampling_params=params)
        for ids, params in zip(job["prompts"], job["params"])
    ]
    batch = engine.generate(input_ids=job["prompts"], sampling_params=job["params"])
    i = job["streamed"]
    stream = engine.generate(
        input_ids=job["prompts"][i], sampling_params=job["params"][i], stream=True
    )
    streamed = list(stream)
    state = engine.get_server_info()["internal_states"][0]
    for _ in range(100):
        time.sleep(0.1)
        (x,) = engine.loop.run_until_complete(engine.tokenizer_manager.get_loads())
        load = [x.num_running_reqs, x.num_waiting_reqs, x.num_used_tokens]
        if not any(load):
            break
    flushed = engine.flush_cache()
    answers = {"alone": alone, "batch": batch, "streamed": streamed}
    answers |= {"load": load, "page_size": state["page_size"]}
    answers["flushed"] = bool(flushed.success)
    print("ANSWERS" + json.dumps(answers, default=str))
    engine.shutdown()
"""


def params() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"max_new_tokens": length, "temperature": 0} for length in LENGTHS
    ]
    # A token a forward, almost: an answer of many rounds is a stream of many chunks.
    found[LONG]["custom_params"] = {"dllm": {"threshold": 0.0}}
    return found


@pytest.fixture(scope="module", params=[1, 16], ids=lambda n: f"page_size={n}")
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Everything one Engine answered in a program of its own."""
    script = tmp_path_factory.mktemp("engine") / "offline.py"
    script.write_text(SCRIPT)
    job = {
        "model_path": str(DEMO),
        "prompts": PROMPTS,
        "params": params(),
        "streamed": LONG,
        "flags": {"page_size": request.param},
    }
    done = run_python(
        [str(script), json.dumps(job)],
        timeout=400,
        env={"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    )
    assert "ANSWERS" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(done.stdout.split("ANSWERS")[1].split("\n")[0])
    assert answers["page_size"] == request.param
    return answers


@pytest.fixture(scope="module")
def served(demo_server: Server) -> list[dict[str, Any]]:
    return [
        demo_server.generate(prompt, **sampling)
        for prompt, sampling in zip(PROMPTS, params(), strict=True)
    ]


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["output_ids"] == theirs["output_ids"]
    assert ours["text"] == theirs["text"]
    for field in (*FIELDS, "finish_reason", "prompt_tokens", "completion_tokens"):
        assert ours["meta_info"][field] == theirs["meta_info"][field], field


def test_each_alone(engine: dict[str, Any], served: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(engine["alone"], served, strict=True):
        same(ours, theirs)
        assert set(FIELDS) <= set(ours["meta_info"])


def test_as_one_batch(engine: dict[str, Any], served: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(engine["batch"], served, strict=True):
        same(ours, theirs)


def test_streamed(engine: dict[str, Any], served: list[dict[str, Any]]) -> None:
    *chunks, last = engine["streamed"]
    assert chunks, "one chunk is no stream"
    same(last, served[LONG])
    for earlier, later in zip(chunks, [*chunks[1:], last], strict=True):
        assert later["text"].startswith(earlier["text"])
        forwards = [x["meta_info"]["num_forwards"] for x in (earlier, later)]
        assert forwards[0] <= forwards[1]


def test_the_answers_differ(served: list[dict[str, Any]]) -> None:
    """Guards the comparisons above against a model that always says the same."""
    assert len({answer["text"] for answer in served}) > len(PROMPTS) // 2


def test_the_pool_is_empty_afterwards(engine: dict[str, Any]) -> None:
    assert engine["load"] == [0, 0, 0]
    assert engine["flushed"]
