"""Stock clients get their answers: their libraries, or exactly what they send.

The bodies of clients that are no dependency of ours were read from ollama 0.6.3,
litellm 1.110, langchain-openai 1.7 and the source of Open WebUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import BadRequestError, OpenAI

from helpers.serving_harness import Server
from helpers.warm_start import run_python
from sglang_dllm.demo import demo_path

QUESTION = "Tom has 23 apples. He buys 15 more. How many apples does Tom have?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
CHAT = {"model": "demo", "messages": MESSAGES}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def text(client: OpenAI) -> str:
    """The answer of chat to the question, in a canvas of 256."""
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def test_openai_chat_and_completions(client: OpenAI, text: str) -> None:
    chat: Any = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    parts = list(chat)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text
    assert parts[-1].usage.completion_tokens > 0
    completion = client.completions.create(model="demo", prompt="hi", max_tokens=8)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 8
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_responses(client: OpenAI, text: str) -> None:
    answer = client.responses.create(model="demo", input=QUESTION)
    assert answer.output_text == text
    assert answer.usage is not None
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 0
    for length in (64, 2):
        chat = client.chat.completions.create(**CHAT, max_tokens=length)
        answer = client.responses.create(
            model="demo", input=MESSAGES, max_output_tokens=length
        )
        assert answer.output_text == chat.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.output_tokens == chat.usage.completion_tokens  # type: ignore[union-attr]
    streamed: Any = client.responses.create(model="demo", input=QUESTION, stream=True)
    events = list(streamed)
    assert [event.type for event in events[:2]] == [
        "response.created",
        "response.in_progress",
    ]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == text
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_output_tokens", 5000),
        ("max_output_tokens", 0),
        ("text.format", {"type": "xml"}),
        ("text.format", {"type": "json_schema", "name": "a"}),
        ("tools", [{"type": "function", "name": "f", "parameters": {}}]),
        ("top_logprobs", 2),
        ("truncation", "auto"),
        ("seed", 1),
        ("stop_token_ids", [5]),
        ("temperature", 3),
        ("custom_params", {"dllm": {}}),
    ],
)
def test_what_a_response_cannot_have(
    demo_server: Server, field: str, value: Any
) -> None:
    first, _, second = field.partition(".")
    body = {"model": "demo", "input": QUESTION, first: value}
    if second:
        body[first] = {second: value}
    for stream in (False, True):
        refused = demo_server.post("/v1/responses", **body, stream=stream)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(f"{field}=")


def test_anthropic(demo_server: Server, text: str) -> None:
    """The library, with a call of each kind; equal to chat of the same length."""
    anthropic = pytest.importorskip("anthropic")
    asked = {**CHAT, "max_tokens": 256}
    with anthropic.Anthropic(base_url=demo_server.base_url, api_key="x") as client:
        answer = client.messages.create(**asked)
        assert (answer.content[0].text, answer.stop_reason) == (text, "end_turn")
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == text
        counted = client.messages.count_tokens(**CHAT)
        assert counted.input_tokens == answer.usage.input_tokens
        short = client.messages.create(**{**asked, "max_tokens": 2})
        assert (short.usage.output_tokens, short.stop_reason) == (2, "max_tokens")
        cut = client.messages.create(**asked, stop_sequences=["38"], system="Count.")
        assert "38" not in cut.content[0].text
        for more in (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
            {"tool_choice": {"type": "any"}},
            {"extra_body": {"output_format": {"type": "json_schema", "schema": 5}}},
            {"max_tokens": 5000},
        ):
            for streamed in (False, True):
                with pytest.raises(anthropic.BadRequestError):
                    client.messages.create(**{**asked, **more}, stream=streamed)


def test_anthropics_form_of_an_answer(demo_server: Server) -> None:
    """``output_config.format``, or ``output_format`` as older clients have it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}},
              "required": ["a"]}  # fmt: skip
    form = {"type": "json_schema", "schema": schema}
    asked = {**CHAT, "max_tokens": 32}
    found = [
        demo_server.post("/v1/messages", **asked, **fields)
        for fields in ({"output_config": {"format": form}}, {"output_format": form})
    ]
    wrong = {"type": "json_schema", "schema": {"type": "x"}}
    for is_streamed in (False, True):
        fields = {"output_config": {"format": wrong}, "stream": is_streamed}
        refused = demo_server.post("/v1/messages", **asked, **fields)
        assert refused.status_code == 400
        assert "output_config.format" in refused.text
    if found[0].status_code == 400:
        assert "/v1/chat/completions" in found[0].text, "SGLang has no place for it"
        assert found[1].text == found[0].text
        return
    texts = [answer.json()["content"][0]["text"] for answer in found]
    assert texts[0] == texts[1]
    assert isinstance(json.loads(texts[0])["a"], int)


def lines(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """The lines of a stream, asked as litellm does: without a content type."""
    url = server.base_url + path
    response = requests.post(url, data=json.dumps(body), timeout=300)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def said(line: dict[str, Any]) -> str:
    return str(line["message"]["content"] if "message" in line else line["response"])


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/api/chat", {**CHAT, "tools": []}),
        ("/api/generate", {"model": "demo", "prompt": QUESTION, "images": []}),
    ],
)
def test_ollama(demo_server: Server, text: str, path: str, asked: Any) -> None:
    """ollama-python's and litellm's bodies; the text is that of chat."""
    for options in (None, {"num_predict": -1}, {"num_predict": -2, "num_ctx": 512}):
        *parts, last = lines(demo_server, path, **asked, options=options)
        assert "".join(map(said, parts)) == text
        assert said(last) == ""
        assert (last["done"], last["done_reason"]) == (True, "stop")
        assert last["prompt_eval_count"] > 0
        assert last["eval_count"] > 0
        assert last["total_duration"] > 0
    seeded = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    chat = demo_server.post("/v1/chat/completions", **CHAT, **seeded, max_tokens=64)
    neutral = {"repeat_penalty": 1.0, "mirostat": 0, "num_gpu": 1, "num_ctx": 2048}
    options = {**seeded, **neutral, "num_predict": 64, "top_k": 0, "stop": []}
    whole = demo_server.post(path, **asked, stream=False, options=options)
    assert said(whole.json()) == chat.json()["choices"][0]["message"]["content"]
    short = demo_server.post(path, **asked, stream=False, options={"num_predict": 2})
    assert short.json()["eval_count"] == 2
    assert short.json()["done_reason"] == "length"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("repeat_penalty", 1.3),
        ("mirostat", 2),
        ("num_predict", 5000),
        ("num_predict", 0),
        ("num_ctx", 64),
        ("temperature", "hot"),
    ],
)
def test_an_option_that_ollama_has_alone(
    demo_server: Server, path: str, option: str, value: Any
) -> None:
    for stream in (False, True):
        refused = demo_server.post(
            path,
            **CHAT,
            prompt=QUESTION,
            stream=stream,
            options={option: value},
        )
        assert refused.status_code == 400
        assert refused.json()["error"].startswith(f"options.{option}={value!r}")


def test_ollama_generates_without_a_template(
    demo_server: Server, client: OpenAI
) -> None:
    asked = {"model": "demo", "prompt": QUESTION, "raw": True, "stream": False}
    lengths = {"num_predict": 64}
    raw = demo_server.post("/api/generate", **asked, options=lengths).json()
    plain = client.completions.create(model="demo", prompt=QUESTION, max_tokens=64)
    assert raw["response"] == plain.choices[0].text
    loaded = demo_server.post("/api/generate", model="demo", stream=False).json()
    assert (loaded["response"], loaded["done_reason"]) == ("", "load")


def test_open_webui(demo_server: Server, text: str) -> None:
    """It asks both of its backends for their models, then chats in a stream."""
    url = demo_server.base_url
    version = requests.get(f"{url}/api/version", timeout=30).json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 1, 16)
    tags = requests.get(f"{url}/api/tags", timeout=30).json()
    assert tags["models"][0]["model"] == "demo"
    (loaded,) = requests.get(f"{url}/api/ps", timeout=30).json()["models"]
    assert (loaded["name"], loaded["context_length"]) == ("demo", 1024)
    models = requests.get(f"{url}/v1/models", timeout=30).json()
    assert models["data"][0]["id"] == "demo"
    shown = requests.post(f"{url}/api/show", data='{"name": "demo"}', timeout=30)
    assert shown.json()["capabilities"] == ["completion"]
    *parts, last = lines(
        demo_server, "/api/chat", **CHAT, options={}, keep_alive="5m", stream=True
    )
    assert "".join(map(said, parts)) == text
    assert last["done"]
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chat = demo_server.post("/v1/chat/completions", **body, user="a", chat_id="b")
    assert chat.text.rstrip().endswith("data: [DONE]")


def test_langchain_and_litellm(client: OpenAI, text: str) -> None:
    """Both use the OpenAI library, and know a long prompt by its error's code."""
    answer = client.chat.completions.create(
        **CHAT, stream=False, max_completion_tokens=256
    )
    assert answer.choices[0].message.content == text
    item: Any = {"content": QUESTION, "role": "user", "type": "message"}
    response = client.responses.create(
        model="demo", stream=False, input=[item], max_output_tokens=256
    )
    assert response.output_text == text
    with pytest.raises(BadRequestError, match="context_length_exceeded"):
        client.chat.completions.create(**CHAT, max_completion_tokens=5000)


def test_the_benchmark_of_sglang(demo_server: Server, tmp_path: Path) -> None:
    turns = [{"value": QUESTION}, {"value": "38"}]
    data, out = tmp_path / "data.json", tmp_path / "out.jsonl"
    data.write_text(json.dumps([{"conversations": turns}] * 4))
    words = [
        *("-m", "sglang.bench_serving"),
        *("--backend", "sglang-oai-chat", "--base-url", demo_server.base_url),
        *("--model", "demo", "--tokenizer", str(demo_path())),
        *("--dataset-name", "random", "--dataset-path", str(data)),
        *("--num-prompts", "4", "--random-input-len", "24"),
        *("--random-output-len", "32", "--random-range-ratio", "1"),
        *("--output-file", str(out)),
    ]
    done = run_python(words, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())
    assert figures["completed"] == 4
    assert figures["total_output_tokens"] > 0
