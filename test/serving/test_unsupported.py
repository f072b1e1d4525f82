"""Fields of other engines: switched off they pass and are gone, else they are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.bad_bodies import ROUTES, SMALLEST
from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.body import ServedModel, check_body
from sglang_dllm.serving.foreign_fields import NEUTRAL

MODEL = ServedModel(vocab_size=375, defaults={"temperature": 0.0})

OFF: list[tuple[str, Any]] = [
    *(("use_beam_search", False), ("early_stopping", False), ("num_beams", 1)),
    *(("length_penalty", value) for value in (1, 1.0)),
    *(("typical_p", value) for value in (1, 1.0)),
    *(("tfs", 1), ("tfs_z", 1.0), ("top_a", 0), ("mirostat", 0)),
    *(("dynatemp_range", 0), ("dynatemp_exponent", 1), ("epsilon_cutoff", 0)),
    *(("mirostat_tau", 5.0), ("mirostat_eta", 0.1), ("repeat_last_n", 64)),
    *(("repeat_penalty", 1.0), ("xtc_probability", 0), ("xtc_threshold", 0.1)),
    *(("dry_multiplier", 0), ("dry_base", 1.75), ("smoothing_factor", 0)),
    *(("n_predict", -1), ("num_predict", -1), ("min_length", 0), ("priority", 0)),
    *(("frequency_penalty", 0), ("presence_penalty", 0.0), ("num_beams", 1)),
    *(("logit_bias", {}), ("bad_words", []), ("guided_json", None), ("grammar", "")),
    *(("response_format", {"type": "text"}), ("function_call", "none")),
    ("do_sample", False),
    *(("detokenize", True), ("watermark", False), ("truncate_prompt_tokens", None)),
    *(("num_return_sequences", 1), ("stop_sequences", []), ("rep_pen", 1.0)),
    *(("chat_template", None), ("max_output_tokens", None), ("suppress_tokens", [])),
    *(("add_generation_prompt", True), ("renormalize_logits", False)),
]
KEPT_OUT = {"echo", "add_special_tokens"}


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(("field", "value"), OFF)
def test_a_field_that_is_off_is_gone(route: str, field: str, value: Any) -> None:
    body = {**SMALLEST[route], field: value}
    found = check_body(ROUTES[route], body, MODEL)
    known_to_nobody = field in ("dynatemp_exponent", "mirostat_tau", "mirostat_eta")
    known_to_nobody |= field in ("repeat_last_n", "xtc_threshold", "dry_base")
    assert field not in found or known_to_nobody


@pytest.mark.parametrize(("field", "value"), OFF)
def test_a_field_that_is_off_is_gone_natively(field: str, value: Any) -> None:
    if field == "do_sample":
        return
    body = {"text": "a", "sampling_params": {field: value, "max_new_tokens": 4}}
    found = check_body("/generate", body, MODEL)
    assert found["sampling_params"] == {"max_new_tokens": 4}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - KEPT_OUT))
@pytest.mark.parametrize("value", [7, 0.37, "x", {"a": 1}, ["a"]])
def test_a_field_that_is_on_is_named(route: str, field: str, value: Any) -> None:
    body = {**SMALLEST[route], field: value}
    named = field
    if route == "generate":
        body = {"text": "a", "sampling_params": {field: value}}
        named = f"sampling_params.{field}"
    if field in ("max_new_tokens", "sampling_seed") and value == 7:
        return  # /generate has these itself, and the other two refuse them
    served = {("max_completion_tokens", 7, "chat"), ("suffix", "x", "completions")}
    served |= {("logprobs", 7, "completions"), ("best_of", 7, "completions")}
    served |= {("min_tokens", 7, "chat"), ("min_tokens", 7, "completions")}
    served |= {("min_new_tokens", 7, "generate"), ("min_p", 0.37, route)}
    served |= {("json_schema", "x", "generate")}  # the compiler refuses it
    served |= {("structural_tag", "x", "generate")}
    if isinstance(value, int | float | str) and (field, value, route) in served:
        return
    forms = {"guided_regex": "x", "guided_grammar": "x", "guided_json": {"a": 1}}
    if route != "generate" and {**forms, "guided_choice": ["a"]}.get(field) == value:
        return
    with pytest.raises(BadRequest) as refusal:
        check_body(ROUTES[route], body, MODEL)
    assert named in str(refusal.value)


def test_the_switches_of_chat_and_of_completions() -> None:
    for route, field, value in (
        *(("chat", "echo", False), ("chat", "add_special_tokens", False)),
        ("completions", "add_special_tokens", True),
    ):
        body = {**SMALLEST[route], field: value}
        assert field not in check_body(ROUTES[route], body, MODEL)


@pytest.mark.parametrize(("temperature", "samples"), [(0, False), (0.7, True)])
def test_do_sample_may_only_say_what_the_temperature_says(
    temperature: float, samples: bool
) -> None:
    body = {**SMALLEST["chat"], "temperature": temperature, "do_sample": samples}
    assert "do_sample" not in check_body(ROUTES["chat"], body, MODEL)
    with pytest.raises(BadRequest, match="do_sample"):
        check_body(ROUTES["chat"], body | {"do_sample": not samples}, MODEL)


def test_words_of_other_engines_that_are_honoured() -> None:
    for route in ("chat", "completions"):
        body = {**SMALLEST[route], "top_k": 0, "include_stop_str_in_output": True}
        found = check_body(ROUTES[route], body, MODEL)
        assert found["top_k"] == -1 and found["no_stop_trim"] is True
        assert "include_stop_str_in_output" not in found
    native = {"text": "a", "sampling_params": {"top_k": 0}}
    found = check_body("/generate", native, MODEL)
    assert found["sampling_params"] == {"top_k": -1}


TOOL = {"type": "function", "function": {"name": "probe"}}
CALL = {"id": "1", "type": "function", "function": {"name": "probe", "arguments": ""}}


def test_tools_need_a_place_in_the_chat_template() -> None:
    user = {"role": "user", "content": "a"}
    called = [user, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    for change, field in (
        ({"tools": [TOOL]}, "tools"),
        ({"messages": called}, r"messages\[1\].tool_calls"),
    ):
        body = {**SMALLEST["chat"], **change}
        with pytest.raises(BadRequest, match=f"^{field}=.*no place for"):
            check_body(ROUTES["chat"], body, MODEL)
        names = frozenset({"tools", "tool_calls"})
        takes = replace(MODEL, template_names=names)
        assert check_body(ROUTES["chat"], body, takes)["messages"] == body["messages"]
    empty = {**SMALLEST["chat"], "tools": [], "tool_choice": "none"}
    assert check_body(ROUTES["chat"], empty, MODEL)["tool_choice"] == "none"
