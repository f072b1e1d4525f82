"""sglang.srt.managers.tokenizer_manager

Upstream: checks lengths only; a token id outside the vocabulary ends the scheduler,
and sampling fields its dLLMs ignore pass without a word.
Ours: requests are checked at the door (``serving.door``), and the denoising report
of a response becomes plain fields of its meta_info (``scheduling.report``).
Goes when: upstream has a per-model request validator and scalar customized_info.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sglang_dllm.upstream.hooks import Hook

if TYPE_CHECKING:
    from sglang_dllm.serving.body import ServedModel


def is_ours(manager: Any) -> bool:
    from sglang_dllm.runtime.dllm_config import is_full_attention

    return is_full_attention(manager.model_config.hf_config)


@lru_cache(maxsize=1)
def served_model(manager: Any) -> ServedModel:
    """What is asked of every request's fields; a server has one manager."""
    from sglang_dllm.serving.body import ServedModel
    from sglang_dllm.serving.validation import default_temperature

    config = manager.model_config
    return ServedModel(
        vocab_size=config.vocab_size,
        temperature=default_temperature(
            manager.preferred_sampling_params, config.get_default_sampling_params()
        ),
    )


async def check_prompts(manager: Any, body: dict[str, Any]) -> None:
    """What ``_validate_one_request`` will check of a native body, ahead of it."""
    prompts = body["input_ids"] if "input_ids" in body else body["text"]
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    given = body.get("sampling_params") or {}
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt, _ = await manager._tokenize_texts(prompt)
        _check(manager, dict(given[i] if isinstance(given, list) else given), prompt)


def _check(manager: Any, params: dict[str, Any], input_ids: Any) -> None:
    from sglang.srt.utils import get_bool_env_var

    from sglang_dllm.runtime.dllm_config import decode_config
    from sglang_dllm.serving.validation import CapacityLimits, check_request

    preferred = manager.preferred_sampling_params or {}
    for key in ("max_new_tokens", "custom_params"):
        if params.get(key) is None and preferred.get(key) is not None:
            params[key] = preferred[key]
    args = manager.server_args
    # Both make attention read keys and values from the pool, where the two rows of a
    # guided canvas would overwrite each other.
    one_row = args.enable_deterministic_inference or get_bool_env_var(
        "SGLANG_FLASHINFER_USE_PAGED"
    )
    check_request(
        params,
        input_ids,
        manager.model_config.vocab_size,
        CapacityLimits(
            manager.max_req_input_len,
            args.page_size,
            1 if one_row else args.max_running_requests,
            args.max_prefill_tokens,
        ),
        decode_config(args, manager.model_config.hf_config),
    )


def _validate_one_request(
    original: Callable[..., Any], self: Any, obj: Any, input_ids: Any
) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    if is_ours(self) and isinstance(obj, GenerateReqInput):
        _check(self, obj.sampling_params, input_ids)
    return original(self, obj, input_ids)


async def _generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not is_ours(self) or not isinstance(obj, GenerateReqInput):
        async for out in original(self, obj, request):
            yield out
        return
    from sglang_dllm.runtime.report import into_meta_info

    _check_arguments(self, obj)
    async for out in original(self, obj, request):
        for response in out if isinstance(out, list) else [out]:
            into_meta_info(response["meta_info"])
        yield out


# Set by SGLang's own routes, not by a client.
_INTERNAL = ("received_time", "external_trace_header", "custom_labels", "modalities")


def _check_arguments(manager: Any, obj: Any) -> None:
    """Check a request before SGLang unfolds it, and give it the default temperature.

    Prompts of one request share its parameters; each gets its own dict, because the
    answer length that is filled in depends on the prompt.
    """
    from sglang_dllm.serving.body import check_generate

    model = served_model(manager)
    fields = {
        field.name: getattr(obj, field.name)
        for field in dataclasses.fields(obj)
        if field.name not in _INTERNAL
    }
    check_generate(fields, model.vocab_size)
    given = obj.sampling_params or {}
    prompts = obj.text if obj.text is not None else obj.input_ids
    if isinstance(given, dict):
        is_batch = not isinstance(prompts, str) and not isinstance(prompts[0], int)
        obj.sampling_params = (
            [_with_defaults(given, model) for _ in prompts]
            if is_batch
            else _with_defaults(given, model)
        )
    else:
        obj.sampling_params = [_with_defaults(one, model) for one in given]


def _with_defaults(params: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    given = {key: value for key, value in params.items() if value is not None}
    return {"temperature": model.temperature, **given}


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS = (
    Hook(
        target=f"{_MANAGER}._validate_one_request",
        fn=_validate_one_request,
        why="requests that the scheduler could not survive, or whose fields it would "
        "ignore, are refused before they are queued",
        contract=("self", "obj", "input_ids"),
        remove_when="upstream has a per-model request validator",
    ),
    Hook(
        target=f"{_MANAGER}.generate_request",
        fn=_generate_request,
        why="sampling parameters are used before they are checked; customized_info "
        "carries lists of one value per token only",
        contract=("self", "obj", "request"),
        remove_when="upstream has a per-model request validator and carries scalars "
        "of a request to meta_info",
    ),
)
