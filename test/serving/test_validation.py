"""The checks of a request and of a body, without a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi import HTTPException

from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.errors import RequestError
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.body import (
    ServedModel,
    check_body,
    check_sampling,
)
from sglang_dllm.serving.raw_body import explain_malformed
from sglang_dllm.serving.validation import (
    CapacityLimits,
    check_request,
)

MODEL = ServedModel(vocab_size=100, defaults={"temperature": 0.25})
LIMITS = CapacityLimits(max_req_input_len=95)
LLADA = FAMILIES["LLaDAModelLM"]
DECODE = parse_decode_config("FullAttnMultiBlock", LLADA, {})
FACTS = ModelFacts(LLADA, mask_id=9, eos_ids=(5,), vocab_size=100, newline_ids=(7,))
MESSAGES = [{"role": "user", "content": "a"}]


def test_a_refusal_is_a_400_wherever_it_is_raised() -> None:
    refusal = refused("top_p", 2, "a number")
    assert isinstance(refusal, RequestError) and isinstance(refusal, HTTPException)
    assert refusal.status_code == 400
    assert str(refusal) == refusal.detail
    assert str(refusal) == "top_p=2 is not allowed; expected a number"


def test_a_refusal_is_short_and_valid_unicode() -> None:
    message = str(refused("stop", "\ud800" * 1000, "text"))
    assert len(message) < 150
    message.encode()


def test_an_answer_without_a_length_grows_up_to_what_fits() -> None:
    for given in ({}, {"max_new_tokens": None}):
        params: dict[str, Any] = dict(given)
        check_request(params, [1] * 10, LIMITS, DECODE, FACTS)
        assert params["max_new_tokens"] == 89
        assert params["custom_params"]["dllm"]["length"] == "append"
    fixed = ({"length": "fixed"}, {"algorithm": "AdaptiveParallel"})
    for dllm in fixed:
        params = {"custom_params": {"dllm": dllm}}
        check_request(params, [1] * 10, CapacityLimits(1000), DECODE, FACTS)
        assert params["max_new_tokens"] == 256
        assert params["custom_params"]["dllm"]["length"] == "fixed"
    params = {"max_new_tokens": 40}
    check_request(params, [1] * 10, LIMITS, DECODE, FACTS)
    assert params["custom_params"]["dllm"]["length"] == "fixed"


def test_the_server_may_say_which_rule_finds_the_length() -> None:
    for rule in ("fixed", "append"):
        config = replace(DECODE, given={DECODE.algorithm: {"length": rule}})
        for given in ({}, {"max_new_tokens": 60}):
            params: dict[str, Any] = dict(given)
            check_request(params, [1] * 10, LIMITS, config, FACTS)
            assert params["custom_params"]["dllm"]["length"] == rule
            expected = 60 if given else 89
            assert params["max_new_tokens"] == expected


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 200])
@pytest.mark.parametrize("pool", [512, 2048])
def test_the_limit_is_never_more_than_the_scheduler_holds(
    page_size: int, prompt_len: int, pool: int
) -> None:
    """Against sglang 0.5.17's own two bounds (Scheduler.init_req_max_new_tokens)."""
    context = 1024
    max_req_len = min(context, pool) - 1
    paged = -(-prompt_len // page_size) * page_size
    held = min(max_req_len - prompt_len - 1, pool - paged - page_size - 1)
    most = CapacityLimits(max_req_len - 5, page_size).max_answer_len(prompt_len)
    assert most <= held
    if page_size == 1 or pool < context:
        assert most == held
    assert held - most < 2 * page_size


@pytest.mark.parametrize(
    ("input_ids", "params", "named"),
    [
        ([], {}, "input_ids: the prompt is empty"),
        (None, {}, "input_ids: the prompt is empty"),
        ([1, 100], {}, "token id 100 is outside the vocabulary; expected 0 to 99"),
        ([-1], {}, "token id -1"),
        ([1] * 95, {}, "95 tokens; expected 1 to 94"),
        ([1] * 10, {"max_new_tokens": 90}, "max_new_tokens=90 does not fit"),
        (
            [1] * 10,
            {"max_new_tokens": 90},
            "max_new_tokens can be 1 to 89; this model's maximum context length",
        ),
        ([1] * 10, {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_what_does_not_fit_is_named(
    input_ids: list[int] | None, params: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_request(params, input_ids, LIMITS, DECODE, FACTS)
    assert named in str(caught.value)


def test_a_body_without_a_temperature_gets_the_models() -> None:
    for extra in ({}, {"temperature": None}):
        body = {"messages": MESSAGES, **extra}
        checked = check_body("/v1/chat/completions", body, MODEL)
        assert checked == {"messages": MESSAGES, "temperature": 0.25}
    body = {"prompt": "a", "temperature": 1}
    assert check_body("/v1/completions", body, MODEL) == body


def test_other_routes_pass_untouched() -> None:
    body = [{"anything": float("nan")}]
    assert check_body("/v1/loads", body, MODEL) is body


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_p": 1, "temperature": 0, "top_k": -1, "n": 1, "stop": ["a"]},
        {"temperature": None, "stop": None, "regex": None, "max_new_tokens": None},
        {"min_p": 0.0, "repetition_penalty": 1, "logit_bias": {}, "json_schema": ""},
        {"stop_token_ids": [0, 99], "sampling_seed": -(2**63), "custom_params": {}},
    ],
)
def test_good_sampling_parameters_pass(params: dict[str, Any]) -> None:
    check_sampling(params, 100, "sampling_params.")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"top_p": True},
            "sampling_params.top_p=True is not allowed; "
            "expected a number above 0, up to 1",
        ),
        (
            {"stop_token_ids": [100]},
            "sampling_params.stop_token_ids: token id 100 is outside the vocabulary; "
            "expected 0 to 99",
        ),
        (
            {"min_p": 1.1},
            "sampling_params.min_p=1.1 is not allowed; expected a number, 0 to 1",
        ),
        (
            {"repetition_penalty": 1.1},
            "sampling_params.repetition_penalty=1.1 is not allowed; expected 1 or "
            "nothing: no paper states a penalty for canvases, whose tokens come in any "
            "order",
        ),
        (
            {"logit_bias": {"100": 1}},
            "sampling_params.logit_bias={'100': 1} is not allowed; expected an object "
            "with token ids, 0 to 99, as strings, and numbers, -100 to 100",
        ),
    ],
)
def test_bad_sampling_parameters_are_named(
    params: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_sampling(params, 100, "sampling_params.")
    assert str(caught.value) == message


def test_an_unknown_sampling_parameter_is_told_the_known_ones() -> None:
    with pytest.raises(
        BadRequest, match="alien is not a known field; expected one of n,"
    ):
        check_sampling({"alien": 1}, 100, "")


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"a": [1, {"b": NaN}]}', "a[1].b=nan"),
        (b'{"stop": ["x", "\\ud800"]}', "stop[1]='\\ud800'"),
        (b'{"\\ud800": 1}', "\\ud800="),
        (b'{"a": 1e999}', "a=inf"),
        (b"\xff", "body: malformed JSON, why"),
        (b"{", "body: malformed JSON, why"),
        (b"[" * 100_000, "body: malformed JSON, why"),
    ],
)
def test_what_is_not_json_is_located(raw: bytes, field: str) -> None:
    message = str(explain_malformed(raw, "why"))
    assert field in message
    message.encode()


@pytest.mark.parametrize("max_new_tokens", [1, 20, 989])
def test_guidance_needs_one_canvas_of_slots_and_two_windows(
    max_new_tokens: int,
) -> None:
    """Both windows attend over fresh keys, so that they share their canvas's slots."""

    def check(limits: CapacityLimits) -> None:
        guided = {"dllm": {"algorithm": "LLaDA", "block_size": 4096, "cfg_scale": 0.5}}
        params = {"max_new_tokens": max_new_tokens, "custom_params": guided}
        check_request(params, [1] * 10, limits, DECODE, FACTS)

    check(CapacityLimits(995, max_windows=2))
    with pytest.raises(BadRequest) as caught:
        check(CapacityLimits(995, max_windows=1))
    assert str(caught.value) == (
        "custom_params.dllm.cfg_scale=0.5 is not allowed; "
        "expected 0 on a server with --max-running-requests 1"
    )


@pytest.mark.parametrize("given", [None, {}, {"dllm": None}, {"dllm": {}}])
def test_a_request_leaves_with_all_options_it_is_decoded_with(given: Any) -> None:
    params: dict[str, Any] = {"max_new_tokens": 48, "custom_params": given}
    check_request(params, [1] * 10, LIMITS, DECODE, FACTS)
    expected = DECODE.resolve({}).finalized(48, FACTS).to_dict()
    assert params["custom_params"] == {"dllm": expected}


def test_what_depends_on_length_and_tokenizer_is_resolved() -> None:
    for name, key, value in (
        ("LLaDA", "steps", 48),
        ("AdaBlock", "delimiter_ids", [7]),
    ):
        given = {"dllm": {"algorithm": name}}
        params: dict[str, Any] = {"max_new_tokens": 48, "custom_params": given}
        check_request(params, [1] * 10, LIMITS, DECODE, FACTS)
        assert params["custom_params"]["dllm"][key] == value
        assert given == {"dllm": {"algorithm": name}}, "the client's object stays"
        again = dict(params)
        check_request(again, [1] * 10, LIMITS, DECODE, FACTS)
        assert again == params


@pytest.mark.parametrize(
    ("prompt_len", "asked", "kept", "answer_len"),
    [
        (10, 20, 10, 20),
        (10, None, 10, 89),
        (10, 500, 10, 89),
        (94, 20, 94, 5),
        (95, 20, 74, 20),
        (500, None, 47, 52),
        (500, 500, 47, 52),
    ],
)
def test_truncation_leaves_room_for_the_answer(
    prompt_len: int, asked: int | None, kept: int, answer_len: int
) -> None:
    params: dict[str, Any] = {"max_new_tokens": asked}
    ids = [1] * prompt_len
    check_request(params, ids, replace(LIMITS, truncates=True), DECODE, FACTS)
    assert len(ids) == kept and params["max_new_tokens"] == answer_len
