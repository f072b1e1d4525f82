"""Fields that ban or prefer tokens, and tools, through servers and stock clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from helpers.odd_items import check_refusals, odd_tools
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


PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
CALLS = "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call>'
    for a in (1, 2)
)
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


CALL = 369
"""A token that the demo model never writes by itself: it begins a prompt."""


@pytest.fixture(scope="module")
def tool_server(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """Its tokenizer has Qwen's token for the beginning of a call."""
    model = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(demo_path(), model)
    tokens = json.loads((model / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        if token["id"] == CALL:
            token |= {"content": "<tool_call>", "special": False}
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["bos_token"], config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    names = json.loads((model / "special_tokens_map.json").read_text())
    del names["bos_token"]
    (model / "special_tokens_map.json").write_text(json.dumps(names))
    template = model / "tools.jinja"
    template.write_text(TEMPLATE)
    return start_server(
        str(model),
        *("--dllm-algorithm", "FullAttnMultiBlock", "--served-model-name", "demo"),
        *("--tool-call-parser", "qwen25", "--chat-template", str(template)),
    )


def test_an_odd_tool_is_refused(tool_server: Server) -> None:
    check_refusals(tool_server, [*odd_tools()][::4])


def test_tools_become_tool_calls(tool_server: Server) -> None:
    """The text of the calls is given, so that it does not depend on the model."""
    client = client_of(tool_server)
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
    with pytest.raises(BadRequestError, match="canvas"):
        client.chat.completions.create(**asked, tool_choice="required")


STOP = {"type": "function", "function": {"name": "halt"}}
TOOLS: Any = [TOOL, STOP]
FORCED: dict[str, Any] = {**ASKED, "max_tokens": 96, "tools": TOOLS}


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def streamed_calls(client: OpenAI, **asked: Any) -> tuple[list[list[str]], str, str]:
    """Names and arguments of the calls of a stream; its text; why it ended."""
    calls: dict[int, list[str]] = {}
    text, reason = "", ""
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            reason = choice.finish_reason or reason
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                both = calls.setdefault(call.index, ["", ""])
                both[0] += call.function.name or ""
                both[1] += call.function.arguments or ""
    return list(calls.values()), text, reason


def test_a_forced_call_is_a_call(tool_server: Server) -> None:
    """The model knows no tools: the form alone makes the call."""
    client = client_of(tool_server)
    choices = ("required", named("add"), named("halt"))

    def whole(choice: Any, seed: int) -> tuple[str, Any]:
        found = client.chat.completions.create(
            **FORCED, tool_choice=choice, temperature=1.0, seed=seed
        )
        message: Any = found.choices[0].message
        assert found.choices[0].finish_reason == "tool_calls"
        assert not message.content
        (call,) = message.tool_calls
        return call.function.name, json.loads(call.function.arguments)

    def streamed(choice: Any, seed: int) -> tuple[str, Any]:
        ((name, arguments),), text, reason = streamed_calls(
            client, **FORCED, tool_choice=choice, temperature=1.0, seed=seed
        )
        assert (text, reason) == ("", "tool_calls")
        return name, json.loads(arguments)

    asked = [(choice, seed) for choice in choices for seed in range(3)]
    with ThreadPoolExecutor(18) as pool:
        wholes = [pool.submit(whole, *one) for one in asked]
        streams = [pool.submit(streamed, *one) for one in asked]
    for (choice, _), one, other in zip(asked, wholes, streams, strict=True):
        name, arguments = one.result()
        assert other.result() == (name, arguments)
        assert choice == "required" or name == choice["function"]["name"]
        if name == "add":
            jsonschema.validate(arguments, PARAMETERS)
        else:
            assert (name, arguments) == ("halt", {})


class Sum(BaseModel):
    a: int


STRICT: Any = pydantic_function_tool(Sum, name="add")


def test_a_stock_client_has_strict_functions(tool_server: Server) -> None:
    """It sends strict functions by default. A text without a call is an answer."""
    client = client_of(tool_server)
    free = client.chat.completions.parse(
        **ASKED, tools=[STRICT], stop=["zzz"], extra_body={"min_tokens": 2}
    )
    assert free.choices[0].message.content
    assert free.choices[0].message.tool_calls is None


def test_a_strict_call_that_the_model_chose(tool_server: Server) -> None:
    """A bias makes it begin calls. It knows no tools: the form makes whole ones."""
    client = client_of(tool_server)
    asked: dict[str, Any] = {
        **{**ASKED, "max_tokens": 128, "tools": [STRICT]},
        "logit_bias": {str(CALL): 100},
    }
    for is_parallel in (True, False):
        chosen = {**asked, "parallel_tool_calls": is_parallel}
        found = client.chat.completions.parse(**chosen).choices[0]
        calls = found.message.tool_calls or []
        assert found.finish_reason == "tool_calls"
        assert all(isinstance(call.function.parsed_arguments, Sum) for call in calls)
        assert len(calls) == (2 if is_parallel else 1)
        streamed, _, reason = streamed_calls(client, **chosen)
        assert reason == "tool_calls"
        assert streamed == [
            [call.function.name, call.function.arguments] for call in calls
        ]


def test_strict_functions_that_are_refused(tool_server: Server) -> None:
    odd = {"type": "object", "patternProperties": {"a": {}}}
    function = {"name": "odd", "parameters": odd, "strict": True}
    bad: Any = {"type": "function", "function": function}
    client = client_of(tool_server)
    for change, words in (
        ({"tools": [STRICT, bad]}, r"tools\[1\].function.parameters.*patternProp"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"extra_body": {"custom_params": {"dllm": {"length": "daedal"}}}}, "length"),
        ({"parallel_tool_calls": False, "extra_body": {"min_tokens": 2}}, "min_tokens"),
    ):
        for is_streamed in (False, True):
            asked = {**ASKED, "tools": [STRICT], **change}
            with pytest.raises(BadRequestError, match=words):
                client.chat.completions.create(**asked, stream=is_streamed)
    # A choice of none asks for no form.
    odd_asked: Any = {**ASKED, "tools": [bad], "tool_choice": "none"}
    assert client.chat.completions.create(**odd_asked).choices


def test_strict_functions_of_messages(tool_server: Server) -> None:
    tool = {"name": "add", "input_schema": PARAMETERS, "strict": True}
    reply = tool_server.post("/v1/messages", **ASKED, tools=[tool])
    if reply.status_code == 400:
        assert "tools[0].strict" in reply.text, "SGLang has no place for it"
    else:
        assert [part["type"] for part in reply.json()["content"]] == ["text"]


def test_a_forced_call_of_messages(tool_server: Server) -> None:
    """Anthropic's words for the same, whole and streamed."""
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    asked: dict[str, Any] = {
        **{"model": "demo", "messages": ASKED["messages"], "max_tokens": 96},
        "tools": tools,
    }
    for choice in ({"type": "any"}, {"type": "tool", "name": "add"}):
        whole = tool_server.post("/v1/messages", **asked, tool_choice=choice).json()
        (block,) = whole["content"]
        assert (block["type"], block["name"]) == ("tool_use", "add")
        jsonschema.validate(block["input"], PARAMETERS)
        assert whole["stop_reason"] == "tool_use"
        text = "".join(
            event["delta"].get("partial_json", "")
            for event in tool_server.events("/v1/messages", **asked, tool_choice=choice)
            if event["type"] == "content_block_delta"
        )
        jsonschema.validate(json.loads(text), PARAMETERS)
    free = tool_server.post("/v1/messages", **asked).json()
    assert free["content"][0]["type"] == "text"


def test_a_forced_call_that_cannot_be(tool_server: Server, demo_server: Server) -> None:
    odd = {"type": "object", "patternProperties": {"a": {}}}
    bad = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    client = client_of(tool_server)
    for change, words in (
        ({"tool_choice": named("gone")}, "gone"),
        ({"tool_choice": "required", "tools": [bad]}, "patternProperties"),
        ({"tool_choice": named("add"), "max_tokens": 8}, "at least"),
        ({"tool_choice": "required", "stop": "a"}, "stop"),
        ({"tool_choice": "required", "extra_body": {"regex": "a"}}, "regex"),
    ):
        # The length of a call is known to the scheduler, behind the door.
        for is_streamed in (False, True)[: 1 if words == "at least" else 2]:
            with pytest.raises(BadRequestError, match=words):
                client.chat.completions.create(
                    **{**FORCED, **change}, stream=is_streamed
                )
    # The template of the demo model has no place for tools.
    for path in ("/v1/chat/completions", "/v1/messages"):
        refused = demo_server.post(path, **{**FORCED, "tool_choice": "required"})
        assert refused.status_code == 400 and "tools" in refused.text


def test_seeded_answers_differ_and_come_again(demo_server: Server) -> None:
    """Five answers of a stock client; the first is that of n = 1."""
    client = client_of(demo_server)

    def five(num: int, seed: int = 3) -> list[str]:
        found = client.chat.completions.create(
            **ASKED, n=num, seed=seed, temperature=2, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in found.choices] == list(range(num))
        return [choice.message.content or "" for choice in found.choices]

    with ThreadPoolExecutor(4) as pool:
        once, again, one, other = pool.map(five, (5, 5, 1, 5), (3, 3, 3, 40))
    assert len(set(once)) == 5
    assert once == again and once[0] == one[0]
    assert set(once).isdisjoint(other)
