"""Log-probabilities over HTTP: every route and form, streamed and whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from helpers.serving_harness import Server

MESSAGES: list[Any] = [{"role": "user", "content": "3+4="}]
QUESTION = "3+4="
NOISE = 1e-4
"""The other requests of a forward change its sums in the last bits."""


@pytest.fixture(scope="module")
def client(demo_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none", max_retries=0)


def entries(found: Any) -> list[tuple[str, float, list[tuple[str, float]]]]:
    return [
        (one.token, one.logprob, [(top.token, top.logprob) for top in one.top_logprobs])
        for one in found
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_chat_has_them_whole_and_streamed(client: OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {
        **{"model": "demo", "messages": MESSAGES, "max_tokens": 32, "seed": 5},
        **{"temperature": temperature, "logprobs": True, "top_logprobs": 3},
    }
    whole = client.chat.completions.create(**options)
    choice = whole.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    found = entries(choice.logprobs.content)
    assert whole.usage is not None and len(found) == whole.usage.completion_tokens
    assert "".join(token for token, _, _ in found) == choice.message.content
    for token, logprob, top in found:
        assert logprob <= 0 and len(top) == 3
        values = [value for _, value in top]
        assert values == sorted(values, reverse=True)
        if temperature == 0:
            assert top[0] == (token, logprob)
        assert sum(map(math.exp, values)) < 1 + 1e-6
    streamed: list[Any] = []
    for part in client.chat.completions.create(stream=True, **options):
        for one in part.choices:
            if one.logprobs is not None:
                streamed += entries(one.logprobs.content)
    assert streamed == found
    plain = {k: v for k, v in options.items() if "logprobs" not in k}
    same = client.chat.completions.create(**plain).choices[0]
    assert same.message.content == choice.message.content and same.logprobs is None


@pytest.mark.parametrize("num", [0, 2])
def test_completions_have_them_for_each_choice(client: OpenAI, num: int) -> None:
    options: dict[str, Any] = {
        **{"model": "demo", "prompt": QUESTION, "max_tokens": 24, "logprobs": num},
        **{"n": 3, "temperature": 1.2, "seed": 3, "stop": "8"},
    }
    whole = client.completions.create(**options)
    parts: dict[int, tuple[list[Any], list[Any]]] = {i: ([], []) for i in range(3)}
    for part in client.completions.create(stream=True, **options):
        for one in part.choices:
            if one.logprobs is not None:
                parts[one.index][0].extend(one.logprobs.token_logprobs or [])
                parts[one.index][1].extend(one.logprobs.top_logprobs or [])
    assert whole.usage is not None
    total = 0
    for choice in whole.choices:
        found = choice.logprobs
        assert found is not None and found.token_logprobs and found.tokens
        total += len(found.tokens)
        assert "".join(found.tokens).startswith(choice.text)
        values, best = parts[choice.index]
        assert values == pytest.approx(found.token_logprobs, abs=NOISE)
        for one, top in zip(best, found.top_logprobs or [], strict=True):
            assert one == pytest.approx(top, abs=NOISE)
        assert all(len(top) == num for top in found.top_logprobs or [])
    assert total == whole.usage.completion_tokens


def test_native_requests_have_ids_and_text(demo_server: Server) -> None:
    params = {"max_new_tokens": 16, "ignore_eos": True}
    body: dict[str, Any] = {
        **{"text": [QUESTION, "1+1="], "sampling_params": params},
        **{"return_logprob": True, "top_logprobs_num": 2},
        "return_text_in_logprobs": True,
    }
    asked, _ = demo_server.post("/generate", **body).json()
    found = asked["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in found] == asked["output_ids"]
    best = asked["meta_info"]["output_top_logprobs"]
    assert [top[0][:2] for top in best] == [one[:2] for one in found]
    assert all(isinstance(text, str) for _, _, text in found)
    assert asked["meta_info"]["input_token_logprobs"] == []
    one = {**body, "text": QUESTION, "return_logprob": True}
    *_, last = demo_server.events("/generate", **one)
    again = last["meta_info"]["output_token_logprobs"]
    assert [one[1:] for one in again] == [one[1:] for one in found]
    values = [value for value, *_ in found]
    assert [value for value, *_ in again] == pytest.approx(values, abs=NOISE)


def test_given_text_was_certain(demo_server: Server) -> None:
    """A stream of drafts has outputs without a token; each token keeps its own."""
    canvas = ["The answer is ", {"mask": 6}, " apples"]
    dllm = {"canvas": canvas, "stream": "draft"}
    params = {"custom_params": {"dllm": dllm}}
    body: dict[str, Any] = {
        **{"text": QUESTION, "sampling_params": params},
        **{"return_logprob": True, "top_logprobs_num": 2},
    }
    *_, last = demo_server.events("/generate", **body)
    info = last["meta_info"]
    found, best = info["output_token_logprobs"], info["output_top_logprobs"]
    assert [token for _, token, _ in found] == last["output_ids"]
    given = [top == [[0.0, one[1], None]] for one, top in zip(found, best, strict=True)]
    assert given[0] and given[-1] and given.count(False) == 6
    assert all(len(top) == 2 for top, is_given in zip(best, given, strict=True)
               if not is_given)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"echo": True, "logprobs": 1}, "/v1/score"),
        ({"logprobs": 21}, "0 to 20"),
        ({"logprobs": True}, "0 to 20"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 129}, "best_of"),
    ],
)
def test_a_completion_is_refused(
    client: OpenAI, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadRequestError, match=named):
        client.completions.create(**{"model": "demo", "prompt": "1", **change})


def test_the_best_of_several_come_back(client: OpenAI) -> None:
    options: dict[str, Any] = {
        **{"model": "demo", "prompt": [QUESTION, "1+1="], "max_tokens": 24},
        **{"temperature": 1.5, "seed": 7},
    }
    all_five = client.completions.create(n=5, logprobs=0, **options)
    best = client.completions.create(n=2, best_of=5, **options)
    wanted = []
    for first in (0, 5):
        ranked = sorted(all_five.choices[first : first + 5], key=_mean, reverse=True)
        wanted += [choice.text for choice in ranked[:2]]
    assert [choice.text for choice in best.choices] == wanted
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage == all_five.usage, "all five were decoded"


def _mean(choice: Any) -> float:
    values = choice.logprobs.token_logprobs
    return sum(values) / len(values) if values else -math.inf


def test_responses_have_them_where_sglang_has_a_place(demo_server: Server) -> None:
    include = ["message.output_text.logprobs"]
    body = {"model": "demo", "input": QUESTION, "max_output_tokens": 16}
    answer = demo_server.post("/v1/responses", **body, include=include, top_logprobs=2)
    if answer.status_code == 400:
        assert "logprobs=true on /v1/chat/completions" in answer.text
        return
    (message,) = answer.json()["output"]
    (content,) = message["content"]
    assert content["logprobs"] and len(content["logprobs"][0]["top_logprobs"]) == 2
