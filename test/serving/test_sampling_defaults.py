"""The sampling of a request that names none."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dllm.config.server import load_decode_config
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.serving.sampling_defaults import (
    SamplingDefaults,
    check_preferred,
    generation_config_of,
)

QWEN = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
}


@pytest.mark.parametrize(
    ("preferred", "generation_config", "expected"),
    [
        (None, None, {"temperature": 0.0}),
        (None, {}, {"temperature": 0.0}),
        (None, QWEN, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        (None, {**QWEN, "do_sample": False}, {"temperature": 0.0}),
        (None, {"top_p": 0.8}, {"temperature": 0.0, "top_p": 0.8}),
        (None, {"temperature": None, "top_k": None}, {"temperature": 0.0}),
        # Transformers writes 0 for "all tokens" too.
        (None, {"temperature": 0.5, "top_k": 0}, {"temperature": 0.5}),
        (None, {"temperature": "hot", "top_p": 0, "top_k": -5}, {"temperature": 0.0}),
        ({"temperature": 0.3}, QWEN, {"temperature": 0.3, "top_p": 0.8, "top_k": 20}),
        ({"top_k": -1, "n": 2}, QWEN, {"temperature": 0.7, "top_p": 0.8}),
        ({"temperature": None}, None, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0.5}, {"temperature": 0}),
    ],
)
def test_defaults(
    preferred: dict[str, Any] | None,
    generation_config: dict[str, Any] | None,
    expected: dict[str, Any],
) -> None:
    found = SamplingDefaults.of_server(preferred, generation_config)
    assert found.to_dict() == expected


def model_config(fields: dict[str, Any], source: str = "model") -> Any:
    config = SimpleNamespace(to_dict=lambda: fields)
    return SimpleNamespace(hf_generation_config=config, sampling_defaults=source)


def test_what_is_dropped_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fields = {**QWEN, "temperature": "hot", "alg": "entropy", "num_beams": 1}
    with caplog.at_level(logging.WARNING):
        assert generation_config_of(model_config(fields)) == fields
        generation_config_of(model_config(fields))
    (line,) = caplog.messages
    assert "temperature='hot', repetition_penalty=1.05" in line
    assert "alg" not in line


def test_other_sampling_defaults_read_no_generation_config(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = model_config({"repetition_penalty": 1.75}, "openai")
    assert generation_config_of(config) is None
    assert not caplog.messages
    assert generation_config_of(SimpleNamespace(hf_generation_config=None)) is None


@pytest.mark.parametrize(
    ("preferred", "named"),
    [
        ({"repetition_penalty": 1.05}, "repetition_penalty"),
        ({"foo": 5}, "foo"),
        ('{"temperature": "hot"}', "temperature='hot'"),
        ({"custom_params": {"other": 1}}, "custom_params"),
        ({"custom_params": {"dllm": 1}}, "custom_params"),
        ({"custom_params": {"dllm": {"steps": "x"}}}, "steps"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ("{", "JSON"),
        ("[1]", "an object"),
    ],
)
def test_preferred_parameters_that_no_request_could_name(
    preferred: Any, named: str
) -> None:
    decode = load_decode_config("LLaDA", FAMILIES["LLaDAModelLM"], None)
    with pytest.raises(ConfigError, match="--preferred-sampling-params") as error:
        check_preferred(preferred, decode, 300)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "preferred",
    [None, {}, "", {"max_new_tokens": 5}, {"custom_params": {"dllm": {"steps": 4}}}],
)
def test_preferred_parameters_that_pass(preferred: Any) -> None:
    decode = load_decode_config("LLaDA", FAMILIES["LLaDAModelLM"], None)
    check_preferred(preferred, decode, 300)
