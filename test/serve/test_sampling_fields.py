"""Fields that ban or prefer tokens, and tools, through servers and stock clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from helpers.serving_harness import Server
from sglang_dllm.demo import demo_path

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
ASKED: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 32,
}
EOS = 370


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0)


def test_the_fields_hold_in_an_answer(demo_server: Server) -> None:
    def ids(**params: Any) -> list[int]:
        params = {"max_new_tokens": 24, "skip_special_tokens": False, **params}
        found: list[int] = demo_server.generate([5, 6, 7], **params)["output_ids"]
        return found

    plain = ids(ignore_eos=True)
    assert plain[0] not in ids(logit_bias={str(plain[0]): -100}, ignore_eos=True)
    assert set(ids(logit_bias={"50": 100}, min_new_tokens=24)) == {50}
    assert set(ids(allowed_token_ids=[50, 51, 52])) <= {50, 51, 52}
    word = plain[:2]
    cut = ids(bad_words=[word], ignore_eos=True)
    assert word not in [cut[i : i + 2] for i in range(len(cut))]
    # The best token alone is left, so that a draw is none.
    assert ids(temperature=1.5, min_p=1.0, ignore_eos=True, sampling_seed=1) == plain
    assert len(ids(min_new_tokens=20)) >= 20
    assert ids(ignore_eos=True) == plain


def test_the_fields_by_a_stock_client(demo_server: Server) -> None:
    client = client_of(demo_server)

    def say(**fields: Any) -> str:
        found = client.chat.completions.create(**ASKED, **fields)
        return found.choices[0].message.content or ""

    plain = say()
    word = plain.split()[0]
    assert word not in say(extra_body={"bad_words": [word]}).split()
    assert say(logit_bias={str(EOS): 100}) == ""
    assert say(extra_body={"bad_words": [], "min_p": 0}) == plain
    for fields in (
        {"logit_bias": {"375": 1}},
        {"logit_bias": {"5": 101}},
        {"extra_body": {"min_tokens": 33}},
        {"extra_body": {"allowed_token_ids": [5], "bad_words": [[5]]}},
        {"extra_body": {"allowed_token_ids": [EOS], "min_tokens": 1}},
        {"frequency_penalty": 0.5},
    ):
        with pytest.raises(BadRequestError, match=next(iter(fields)) + "|_"):
            say(**fields)


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALLS = "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call>'
    for a in (1, 2)
)
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def test_tools_become_tool_calls(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    """The text of the calls is given, so that it does not depend on the model."""
    template = tmp_path / "tools.jinja"
    template.write_text(TEMPLATE)
    server = start_server(
        demo_path(),
        *("--dllm-algorithm", "FullAttnMultiBlock", "--served-model-name", "demo"),
        *("--tool-call-parser", "qwen25", "--chat-template", str(template)),
    )
    client = client_of(server)
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": ASKED["messages"],
        "tools": [TOOL],
        "extra_body": {
            "allowed_token_ids": [EOS],
            "custom_params": {"dllm": {"canvas": [CALLS, {"mask": 1}]}},
        },
    }
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    whole: Any = answer.choices[0].message.tool_calls
    found = [(call.function.name, call.function.arguments) for call in whole]
    assert [(name, json.loads(text)) for name, text in found] == [
        ("add", {"a": 1}),
        ("add", {"a": 2}),
    ]
    streamed: dict[int, list[str]] = {}
    reason = None
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                name_and_text = streamed.setdefault(call.index, ["", ""])
                name_and_text[0] += call.function.name or ""
                name_and_text[1] += call.function.arguments or ""
    assert reason == "tool_calls"
    assert [streamed[i] for i in sorted(streamed)] == [list(one) for one in found]
    plain = client.chat.completions.create(**asked, tool_choice="none")
    assert plain.choices[0].message.content == CALLS
    assert plain.choices[0].message.tool_calls is None
    server.stop()
