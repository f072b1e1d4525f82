"""Scores over HTTP: /v1/score, native requests, lm-eval, and what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.serving_harness import Server
from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import Problem, heldout

TASKS = Path(__file__).parents[2] / "benchmark" / "lm_eval"
TOKENIZER = AutoTokenizer.from_pretrained(demo_path())
NUM_PROBLEMS = 30


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def score(server: Server, **body: Any) -> dict[str, Any]:
    response = server.post("/v1/score", **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def native(server: Server, text: str, seed: int | None = None, **keys: Any) -> Any:
    params = {"custom_params": {"dllm": {"score": keys}}, "sampling_seed": seed}
    return server.post("/generate", text=text, sampling_params=params)


def test_the_route_and_the_native_field_agree(demo_server: Server) -> None:
    items = [" 2", " 3\n4", " 12 = 7"]
    for keys in (
        {"method": "chain"},
        {"method": "confidence", "cfg_scale": 0.5},
        {"method": "mc", "num_samples": 6, "batch_size": 4},
        {},
    ):
        answer = score(demo_server, query="1 + 1 =", items=items, seed=3, **keys)
        assert answer["object"] == "scoring" and answer["model"] == "demo"
        for item, total, tokens, num_forwards in zip(
            items,
            answer["scores"],
            answer["token_scores"],
            answer["num_forwards"],
            strict=True,
        ):
            meta = native(demo_server, "1 + 1 =", 3, continuation=item, **keys).json()[
                "meta_info"
            ]
            assert meta["score"]["log_likelihood"] == pytest.approx(total, abs=1e-4)
            assert meta["num_forwards"] == num_forwards
            assert meta["completion_tokens"] == 0
            assert len(tokens) == len(encode(item))
            assert sum(tokens) == pytest.approx(total)
    usage = answer["usage"]
    num_prompt = len(items) * len(encode("1 + 1 =")) + sum(
        len(encode(i)) for i in items
    )
    assert usage["prompt_tokens"] == usage["total_tokens"] == num_prompt


def test_native_batches(demo_server: Server) -> None:
    """One continuation for all prompts, or one for each; none without."""
    texts, items = ["1 + 1 =", "2 + 1 = "], [" 2", "3"]

    def custom(item: str) -> dict[str, Any]:
        score = {"method": "chain", "continuation": item}
        return {"custom_params": {"dllm": {"score": score}}}

    def sums(params: Any) -> list[float]:
        body = {"text": texts, "sampling_params": params}
        answers = demo_server.post("/generate", **body).json()
        return [one["meta_info"]["score"]["log_likelihood"] for one in answers]

    for params, pairs in (
        (custom(" 2"), zip(texts, [" 2", " 2"], strict=True)),
        (list(map(custom, items)), zip(texts, items, strict=True)),
    ):
        alone = [
            native(demo_server, text, method="chain", continuation=item).json()
            for text, item in pairs
        ]
        expected = [one["meta_info"]["score"]["log_likelihood"] for one in alone]
        assert sums(params) == pytest.approx(expected, abs=1e-4)
    mixed = {"text": texts, "sampling_params": [custom(" 2"), {}]}
    response = demo_server.post("/generate", **mixed)
    assert response.status_code == 400
    assert "dllm.score=None" in response.text


def test_a_seed_gives_the_same_masks_again(demo_server: Server) -> None:
    body = {"query": "5 + 5 =", "items": [" 10 = 10"], "method": "mc", "num_samples": 3}
    first, again, other = (score(demo_server, **body, seed=s) for s in (1, 1, 2))
    assert first["scores"] == pytest.approx(again["scores"], abs=1e-5)
    assert first["scores"] != pytest.approx(other["scores"], abs=1e-3)
    assert score(demo_server, **body) == score(demo_server, **body, seed=0)


def test_trailing_spaces_belong_to_the_continuation(demo_server: Server) -> None:
    """The tokens are those of the whole text, as lm-eval's."""
    one = score(demo_server, query="1 + 1 = ", items=["2"], method="chain")
    two = score(demo_server, query="1 + 1 =", items=[" 2"], method="chain")
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)
    whole = encode("1 + 1 = 2")
    context, target = whole[: len(encode("1 + 1 ="))], whole[len(encode("1 + 1 =")) :]
    ids = score(demo_server, query=context, items=[target], method="chain")
    assert ids["scores"] == pytest.approx(two["scores"], abs=1e-5)


def test_an_empty_query_is_the_first_token_of_a_text(demo_server: Server) -> None:
    start = TOKENIZER.bos_token_id
    start = TOKENIZER.eos_token_id if start is None else start
    empty = score(demo_server, query="", items=["2 + 2"], method="chain")
    ids = score(demo_server, query=[start], items=[encode("2 + 2")], method="chain")
    assert empty["scores"] == pytest.approx(ids["scores"], abs=1e-5)


def chat_prompt(problem: Problem) -> str:
    messages = [{"role": "user", "content": problem.question}]
    text: str = TOKENIZER.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text


def test_greedy(demo_server: Server) -> None:
    """A canvas as long as the answer, which LLaDA's sampler decodes greedily."""
    problem = heldout(1)[0]
    prompt = chat_prompt(problem)
    (num,) = [len(encode(problem.answer))]
    generated = demo_server.post(
        "/generate",
        text=prompt,
        sampling_params={
            "max_new_tokens": num,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"dllm": {"algorithm": "LLaDA", "block_size": num}},
        },
    ).json()["output_ids"]
    query, wrong = encode(prompt), [*generated[:-1], (generated[-1] + 1) % 300]
    answer = score(
        demo_server,
        query=query,
        items=[generated, wrong],
        method="chain",
        is_greedy=True,
    )
    assert answer["is_greedy"] == [True, False]
    assert answer["num_forwards"][0] == 2 * num
    alone = score(demo_server, query=query, items=[generated], method="greedy")
    assert alone["is_greedy"] == [True] and "scores" not in alone


def test_labels_are_sglangs(demo_server: Server) -> None:
    labels = [encode(c)[0] for c in "2345"]
    body = {"query": "1 + 1 =", "items": [" ", " 1"], "label_token_ids": labels}
    plain, soft = (
        score(demo_server, **body),
        score(demo_server, **body, apply_softmax=True),
    )
    for row, item in zip(plain["scores"], body["items"], strict=True):
        prompt = encode(body["query"] + item)
        chain = score(
            demo_server, query=prompt, items=[[t] for t in labels], method="chain"
        )
        assert row == pytest.approx([math.exp(x) for x in chain["scores"]], abs=1e-5)
    for row, p in zip(soft["scores"], plain["scores"], strict=True):
        assert sum(row) == pytest.approx(1)
        assert row == pytest.approx([x / sum(p) for x in p], abs=1e-4)
    first = score(
        demo_server, **{**body, "query": " 1", "items": ["2 +"]}, item_first=True
    )
    second = score(demo_server, **{**body, "query": "2 +", "items": [" 1"]})
    assert first["scores"][0] == pytest.approx(second["scores"][0], abs=1e-5)


def test_tokens_of_generation_beside_scores(demo_server: Server) -> None:
    problems = heldout(4)

    def answer_of(problem: Problem) -> str:
        body = {"text": chat_prompt(problem), "sampling_params": {"max_new_tokens": 48}}
        text: str = demo_server.post("/generate", **body).json()["text"]
        return text

    def scores_of(problem: Problem) -> list[float]:
        items = [problem.answer, problem.answer[::-1]]
        body = {"query": chat_prompt(problem), "items": items, "method": "confidence"}
        found: list[float] = score(demo_server, **body)["scores"]
        return found

    alone = list(map(answer_of, problems)), list(map(scores_of, problems))
    with ThreadPoolExecutor(16) as pool:
        texts, scores = pool.map(answer_of, problems), pool.map(scores_of, problems)
        assert list(texts) == alone[0]
        for found, expected in zip(scores, alone[1], strict=True):
            assert found == pytest.approx(expected, abs=1e-3)
    assert all(right > wrong for right, wrong in alone[1])


def test_an_aborted_score_leaves_no_slot(demo_server: Server) -> None:
    body: dict[str, Any] = {
        "query": "1 + 1 =",
        "items": [" 2 = 2" * 40] * 4,
        "num_samples": 1024,
    }
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(demo_server.post, "/v1/score", **body, rid="long")
        deadline = time.monotonic() + 30
        while not demo_server.load()["num_running_reqs"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for i in range(4):
            demo_server.post("/abort_request", rid=f"long_{i}")
        assert answer.result(timeout=60).status_code == 503
    demo_server.wait_until_idle()


QUERY = {"query": "1 + 1 =", "items": [" 2"]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"query": "1"}, "items"),
        ({"items": ["1"]}, "query"),
        ({**QUERY, "items": []}, "items"),
        ({**QUERY, "items": [""]}, "items[0]"),
        ({**QUERY, "items": [[5]]}, "items[0]"),
        ({"query": [5], "items": ["a"]}, "items[0]"),
        ({"query": [5], "items": [[10**6]]}, "items[0]"),
        ({"query": [], "items": [[5]]}, "query"),
        ({**QUERY, "items": ["1 " * 3000]}, "items"),
        ({**QUERY, "method": "sum"}, "method"),
        ({**QUERY, "method": 5}, "method"),
        ({**QUERY, "num_samples": 0}, "num_samples"),
        ({**QUERY, "num_samples": 1025}, "num_samples"),
        ({**QUERY, "num_samples": "8"}, "num_samples"),
        ({**QUERY, "method": "chain", "num_samples": 8}, "num_samples"),
        ({**QUERY, "cfg_scale": -1}, "cfg_scale"),
        ({**QUERY, "seed": 2**63}, "seed"),
        ({**QUERY, "is_greedy": 1}, "is_greedy"),
        ({**QUERY, "apply_softmax": True}, "apply_softmax"),
        ({**QUERY, "item_first": True}, "item_first"),
        ({**QUERY, "label_token_ids": []}, "label_token_ids"),
        ({**QUERY, "label_token_ids": [10**6]}, "label_token_ids"),
        ({**QUERY, "label_token_ids": [5], "method": "mc"}, "method"),
        ({**QUERY, "temperature": 0.5}, "temperature"),
        ({**QUERY, "num_sample": 5}, "num_sample"),
    ],
)
def test_bad_scores(demo_server: Server, body: dict[str, Any], field: str) -> None:
    response = demo_server.post("/v1/score", **body)
    assert response.status_code == 400, response.text
    assert response.json()["message"].startswith(field), response.text
    assert "expected" in response.json()["message"]


def test_bad_native_scores(demo_server: Server) -> None:
    where = "custom_params.dllm.score"
    for keys, field in (
        ({}, f"{where}.continuation"),
        ({"continuation": ""}, f"{where}.continuation"),
        ({"continuation": []}, f"{where}.continuation"),
        ({"continuation": [True]}, f"{where}.continuation"),
        ({"continuation": [TOKENIZER.mask_token_id]}, f"{where}.continuation"),
        ({"continuation": " 2", "method": "x"}, f"{where}.method"),
        ({"continuation": " 2", "threshold": 1}, f"{where}.threshold"),
    ):
        response = native(demo_server, "1 + 1 =", **keys)
        assert response.status_code == 400, response.text
        assert field in response.text, response.text
    custom = {"dllm": {"score": {"continuation": " 2"}}}
    for more, field in (
        ({"temperature": 0.5}, "sampling_params.temperature"),
        ({"max_new_tokens": 5}, "sampling_params.max_new_tokens"),
        ({"custom_params": {"dllm": {**custom["dllm"], "trace": True}}}, "trace"),
        ({"custom_params": {"dllm": {"score": 5}}}, where),
    ):
        params = {"custom_params": custom, **more}
        response = demo_server.post("/generate", text="1", sampling_params=params)
        assert response.status_code == 400, response.text
        assert field in response.text, response.text
    for route, body in (
        ("/generate", {"text": "1", "stream": True}),
        ("/v1/completions", {"model": "demo", "prompt": "1", "custom_params": custom}),
        (
            "/v1/chat/completions",
            {
                "model": "demo",
                "messages": [{"role": "user", "content": "1"}],
                "custom_params": custom,
            },
        ),
    ):
        if route == "/generate":
            body = {**body, "sampling_params": {"custom_params": custom}}
        response = demo_server.post(route, **body)
        assert response.status_code == 400, response.text
        assert where in response.text


def choices_of(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """A problem and four worked answers; three have another result."""
    *before, last = problem.steps
    lines = [f"{s.left} {s.sign} {s.right} = {s.result}" for s in before]
    wrong = [problem.value + by for by in (-10, -3, -2, -1, 1, 2, 3, 10)]
    results = [problem.value, *rng.sample([x for x in wrong if x >= 0], 3)]
    rng.shuffle(results)
    choices = [
        "\n".join([*lines, f"{last.left} {last.sign} {last.right} = {x}", f"#### {x}"])
        for x in results
    ]
    label = results.index(problem.value)
    return {"question": problem.question, "choices": choices, "label": label}


@pytest.mark.slow
def test_lm_eval_chooses_the_right_answer(
    demo_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured with this seed: see docs/likelihood.md."""
    pytest.importorskip("lm_eval")
    rng = random.Random(0)
    rows = [choices_of(problem, rng) for problem in heldout(NUM_PROBLEMS)]
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    model_args = {
        "base_url": demo_server.base_url,
        "method": "chain",
        "tokenizer": str(demo_path()),
    }
    command = [
        *(sys.executable, "-m", "sglang_dllm", "lm-eval", "run"),
        *("--model", "sglang_dllm", "--model_args", json.dumps(model_args)),
        *("--include_path", str(TASKS), "--tasks", "demo_multiple_choice"),
        *("--metadata", json.dumps({"data": str(data)})),
        *("--apply_chat_template", "--output_path", str(tmp_path)),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]["demo_multiple_choice"]
    with capsys.disabled():
        print(f"\nlm-eval: accuracy {figures['acc,none']:.3f}", end=" ")
    assert figures["acc,none"] >= 0.9


def test_the_model_class(demo_server: Server, monkeypatch: Any) -> None:
    """Generation, order, retries while the queue is full, and what is refused."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from sglang_dllm.lm_eval_model import ServerLM

    def instances(kind: Any, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]

    model = ServerLM(demo_server.base_url, method="chain", is_greedy=True)
    pairs = [("1 + 1 =", " 2"), ("1 + 1 =", " 3"), ("2 + 1 =", " 3")]
    found = model.loglikelihood(instances("loglikelihood", *pairs))
    for (query, item), (total, is_greedy) in zip(pairs, found, strict=True):
        body = {"query": query, "items": [item], "method": "chain", "is_greedy": True}
        answer = score(demo_server, **body)
        assert total == pytest.approx(answer["scores"][0], abs=1e-4)
        assert [is_greedy] == answer["is_greedy"]
    prompt = chat_prompt(heldout(1)[0])
    asked = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
    (text,) = model.generate_until(instances("generate_until", (prompt, asked)))
    assert text and "\n" not in text
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        model.loglikelihood_rolling(instances("loglikelihood_rolling", ("a",)))
    with pytest.raises(RuntimeError, match=r"400 .*method"):
        bad = ServerLM(demo_server.base_url, method="sum")
        bad.loglikelihood(instances("loglikelihood", pairs[0]))
