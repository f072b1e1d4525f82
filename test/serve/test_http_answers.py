"""Good requests are answered well: limits, seeds, streams, stops, usage, defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import OpenAI

from helpers.serving_harness import Server

DEMO = Path(__file__).parents[2] / "python" / "sglang_dllm" / "demo" / "checkpoint"
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none") as client:
        yield client


def longest_prompt(server: Server) -> int:
    """SGLang's own limit: 1017 tokens of a context of 1024, or one page less."""
    info = requests.get(f"{server.base_url}/server_info", timeout=30).json()
    found = int(info["max_req_input_len"]) - 1
    assert found in (1016, 1017)
    return found


def test_the_longest_canvas_is_served_whole(demo_server: Server) -> None:
    """The scheduler shortens what it cannot hold without a word: never for us."""
    prompt, longest = list(range(5, 25)), longest_prompt(demo_server) + 5
    most = longest - len(prompt)
    answer = demo_server.generate(prompt, max_new_tokens=most)
    assert answer["meta_info"]["canvas_len"] == longest
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": most + 1}}
    refused = demo_server.post("/generate", **body)
    assert refused.status_code == 400
    assert f"1 to {most}" in refused.text


def test_the_longest_prompt(demo_server: Server) -> None:
    longest = longest_prompt(demo_server)
    answer = demo_server.generate([5] * longest, max_new_tokens=5)
    assert answer["meta_info"]["canvas_len"] == longest + 5
    answer = demo_server.generate([5] * longest)
    assert answer["meta_info"]["canvas_len"] == longest + 5
    refused = demo_server.post("/generate", input_ids=[5] * (longest + 1))
    assert refused.status_code == 400
    assert f"{longest + 1} tokens; expected 1 to {longest}" in refused.text


def test_the_default_canvas(demo_server: Server, client: OpenAI) -> None:
    fixed = {"custom_params": {"dllm": {"length": "fixed"}}}
    answer = demo_server.generate([5, 6, 7], **fixed)
    assert answer["meta_info"]["canvas_len"] == 3 + 256
    chat = demo_server.post("/v1/chat/completions", messages=MESSAGES).json()
    assert 1 <= chat["usage"]["completion_tokens"] + 1 <= 257
    completion = client.completions.create(model="demo", prompt=QUESTION)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 16


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_temperature_is_greedy(demo_server: Server, path: str) -> None:
    body: dict[str, Any] = {"max_tokens": 48}
    body |= {"messages": MESSAGES} if "chat" in path else {"prompt": QUESTION}
    default, null, greedy = (
        demo_server.post(path, **body, **extra).json()["choices"][0]
        for extra in ({}, {"temperature": None}, {"temperature": 0})
    )
    assert default == null == greedy


def test_no_temperature_is_greedy_natively(demo_server: Server) -> None:
    prompt = list(range(40, 60))
    default, null, greedy = (
        demo_server.generate(prompt, max_new_tokens=48, **extra)["output_ids"]
        for extra in ({}, {"temperature": None}, {"temperature": 0.0})
    )
    assert default == null == greedy


@pytest.mark.parametrize("seed", [0, -1, 42, 2**63 - 1, -(2**63)])
def test_a_seed_repeats_itself(client: OpenAI, demo_server: Server, seed: int) -> None:
    def chat() -> str | None:
        answer = client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=32,
            temperature=0.8,
            seed=seed,
        )
        return answer.choices[0].message.content

    def completion() -> str:
        answer = client.completions.create(
            model="demo", prompt=QUESTION, max_tokens=32, temperature=0.8, seed=seed
        )
        return answer.choices[0].text

    def native() -> list[int]:
        params = {"max_new_tokens": 32, "temperature": 0.8, "sampling_seed": seed}
        ids: list[int] = demo_server.generate([50, 60, 70], **params)["output_ids"]
        return ids

    assert chat() == chat()
    assert completion() == completion()
    assert native() == native()


def several(
    server: Server, route: str, n: int, seed: int | None, stream: bool
) -> list[str]:
    """The n answers of a route, in the order of their indices."""
    options: dict[str, Any] = {"n": n, "temperature": 1.5}
    if route == "/generate":
        params = {**options, "max_new_tokens": 48, "sampling_seed": seed}
        body: dict[str, Any] = {"text": QUESTION, "sampling_params": params}
    else:
        body = {"model": "demo", "max_tokens": 48, "seed": seed, **options}
        is_chat = "chat" in route
        body |= {"messages": MESSAGES} if is_chat else {"prompt": QUESTION}
    if not stream:
        answer = server.post(route, **body).json()
        if route == "/generate":
            found = answer if isinstance(answer, list) else [answer]
            return [one["text"] for one in found]
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == list(range(n))
        return [c.get("text", c.get("message", {}).get("content")) for c in choices]
    texts = [""] * n
    for event in server.events(route, **body):
        if route == "/generate":
            texts[event.get("index", 0)] = event["text"]
            continue
        for choice in event["choices"]:
            piece = choice.get("text", choice.get("delta", {}).get("content"))
            texts[choice["index"]] += piece or ""
    return texts


@pytest.mark.parametrize("route", ["chat/completions", "completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_differ_and_a_seed_repeats_them(
    demo_server: Server, route: str, stream: bool
) -> None:
    route = route if route[0] == "/" else f"/v1/{route}"
    four = several(demo_server, route, 4, 7, stream)
    assert len(set(four)) > 1, "all copies drew the same numbers"
    assert several(demo_server, route, 4, 7, not stream) == four
    assert several(demo_server, route, 1, 7, stream) == four[:1]
    assert several(demo_server, route, 1, 8, stream) == four[1:2]
    assert len(several(demo_server, route, 3, None, stream)) == 3


def test_several_answers_to_several_prompts(client: OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 1.5, "seed": 7}
    prompts = [QUESTION, "1+1="]
    both = client.completions.create(model="demo", prompt=prompts, n=2, **options)
    each = [
        choice.text
        for prompt in prompts
        for choice in client.completions.create(
            model="demo", prompt=prompt, n=2, **options
        ).choices
    ]
    assert [choice.text for choice in both.choices] == each


@pytest.mark.parametrize("stop", [None, "1", ["e", "\n"]])
def test_a_stream_equals_the_whole_answer(
    client: OpenAI, demo_server: Server, stop: Any
) -> None:
    options: dict[str, Any] = {"model": "demo", "max_tokens": 64, "stop": stop}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == (whole.choices[0].message.content or "")
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens

    text = client.completions.create(prompt=QUESTION, **options)
    pieces = client.completions.create(prompt=QUESTION, stream=True, **options)
    assert "".join(p.choices[0].text for p in pieces) == text.choices[0].text
    for one in [stop] if isinstance(stop, str) else stop or []:
        assert one not in text.choices[0].text

    params = {"max_new_tokens": 64} | ({"stop": stop} if stop else {})
    body = {"text": QUESTION, "sampling_params": params}
    answer = demo_server.post("/generate", **body).json()
    last = demo_server.events("/generate", **body)[-1]
    assert last["text"] == answer["text"]
    assert last["output_ids"] == answer["output_ids"]
    assert last["meta_info"]["finish_reason"] == answer["meta_info"]["finish_reason"]


def test_without_include_usage_a_stream_has_none(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=8, stream=True
    )
    assert all(chunk.usage is None for chunk in stream)


def test_echo_repeats_the_prompt(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": QUESTION, "max_tokens": 8}
    plain = client.completions.create(**options).choices[0].text
    assert client.completions.create(echo=True, **options).choices[0].text == (
        QUESTION + plain
    )
    pieces = client.completions.create(echo=True, stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == QUESTION + plain


def test_a_mask_token_in_the_prompt_is_text(demo_server: Server) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    prompt = [5, config["mask_token_id"], 6]
    answer = demo_server.generate(prompt, max_new_tokens=8)
    assert answer["meta_info"]["prompt_tokens"] == 3


def test_fields_without_effect_are_accepted(demo_server: Server) -> None:
    """Clients send these by default, or they are OpenAI fields about the account."""
    answer = demo_server.post(
        "/v1/chat/completions",
        messages=MESSAGES,
        max_tokens=4,
        **{"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        **{"logprobs": False, "top_logprobs": None, "repetition_penalty": 1.0},
        **{"response_format": {"type": "text"}, "tool_choice": "none", "tools": []},
        **{"user": "me", "store": False, "metadata": {"a": "b"}, "n": None},
        **{"min_p": 0, "top_k": -1, "best_of": 1},
    )
    assert answer.status_code == 200, answer.text
    answer = demo_server.post(
        "/generate",
        text="1+1=",
        **{"return_logprob": False, "lora_path": None, "image_data": None},
        **{"logprob_start_len": -1, "top_logprobs_num": 0, "stream": None},
        sampling_params={"max_new_tokens": 4, "min_p": 0, "stop": None, "regex": None},
    )
    assert answer.status_code == 200, answer.text


def test_the_pools_are_empty_again(demo_server: Server) -> None:
    assert demo_server.wait_until_idle()["num_used_tokens"] == 0
