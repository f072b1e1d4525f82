"""The checks of a tokenizer manager: how often they work, and for which models."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from transformers import AutoTokenizer

from sglang_dllm.config.resolve import DecodeConfig
from sglang_dllm.demo import demo_path
from sglang_dllm.serving.request_checks import RequestChecks, checks_of

HF_CONFIG = SimpleNamespace(
    architectures=["LLaDAModelLM"], vocab_size=375, mask_token_id=374, eos_token_id=370
)


class Manager:
    """The part of SGLang's TokenizerManager that the checks read."""

    def __init__(self, **flags: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo_path())
        self.num_tokenized = 0
        self.max_req_input_len = 1000
        self.preferred_sampling_params: dict[str, Any] | None = None
        self.model_config = SimpleNamespace(
            hf_config=copy.copy(HF_CONFIG),
            vocab_size=375,
            hf_generation_config=None,
        )
        fields: dict[str, Any] = {
            "dllm_algorithm": "FullAttnMultiBlock",
            "dllm_algorithm_config": None,
            "page_size": 1,
            "max_running_requests": 4,
            "allow_auto_truncate": False,
            "reasoning_parser": None,
            "tool_call_parser": None,
        }
        self.server_args = SimpleNamespace(**{**fields, **flags})

    async def _tokenize_texts(self, text: str) -> tuple[list[int], None]:
        self.num_tokenized += 1
        return self.tokenizer.encode(text), None


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The request of each call of ``DecodeConfig.resolve``."""
    found: list[Any] = []
    original = DecodeConfig.resolve

    def resolve(self: DecodeConfig, request: Any) -> Any:
        found.append(request)
        return original(self, request)

    monkeypatch.setattr(DecodeConfig, "resolve", resolve)
    return found


def check_json(checks: RequestChecks, path: str, body: dict[str, Any]) -> Any:
    async def read() -> Any:
        return body

    request = SimpleNamespace(scope={"route": SimpleNamespace(path=path)})
    return asyncio.run(checks.check_json(request, read))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_is_tokenized_and_resolved_once_more(
    stream: bool, resolved: list[Any]
) -> None:
    manager = Manager()
    checks = RequestChecks(manager)
    resolved.clear()
    # Without a length, each would be resolved once more for the default rule.
    lengths = {"max_new_tokens": 8}
    body = {"text": ["1+1=", "2+2="], "stream": stream, "sampling_params": lengths}
    assert check_json(checks, "/generate", copy.deepcopy(body)) == body
    assert manager.num_tokenized == len(resolved) == (2 if stream else 0)
    obj = GenerateReqInput(text=body["text"], sampling_params=lengths)
    checks.check_arguments(obj)
    assert obj.sampling_params == [{"temperature": 0.0, **lengths}] * 2
    for params in obj.sampling_params:
        checks.check_prompt(params, [1, 2, 3])
    assert len(resolved) == (4 if stream else 2)


def test_other_routes_are_resolved_once(resolved: list[Any]) -> None:
    manager = Manager()
    checks = RequestChecks(manager)
    resolved.clear()
    body = {"prompt": "1+1=", "stream": True}
    assert check_json(checks, "/v1/completions", body) == {"temperature": 0.0, **body}
    assert (manager.num_tokenized, resolved) == (0, [])


def test_tokenizer_facts_are_in_the_options() -> None:
    checks = RequestChecks(Manager())
    params: dict[str, Any] = {"custom_params": {"dllm": {"algorithm": "AdaBlock"}}}
    checks.check_prompt(params, [1, 2, 3])
    ids = params["custom_params"]["dllm"]["delimiter_ids"]
    assert ids and list(checks.facts.newline_ids) == ids


def test_preferred_options_are_resolved_too() -> None:
    manager = Manager()
    preferred = {"max_new_tokens": 7, "custom_params": {"dllm": {"threshold": 0.25}}}
    manager.preferred_sampling_params = preferred
    params: dict[str, Any] = {}
    RequestChecks(manager).check_prompt(params, [1])
    assert params["max_new_tokens"] == 7
    assert params["custom_params"]["dllm"]["threshold"] == 0.25
    assert preferred["custom_params"] == {"dllm": {"threshold": 0.25}}


def test_only_our_models_under_our_algorithms_are_checked() -> None:
    manager = Manager()
    checks = checks_of(manager)
    assert checks is not None and checks_of(manager) is checks
    for algorithm in (None, "LowConfidence", "OfAnotherPlugin"):
        assert checks_of(Manager(dllm_algorithm=algorithm)) is None
    for architectures in (["LlamaForCausalLM"], [], None):
        manager = Manager()
        manager.model_config.hf_config.architectures = architectures
        assert checks_of(manager) is None
