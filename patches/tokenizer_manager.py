"""sglang.srt.managers.tokenizer_manager

Upstream: checks lengths only. A token id outside the vocabulary ends the scheduler.
Sampling fields that its dLLMs ignore pass without a word.
Ours: a request is checked before it is queued, and its options are resolved
(``serving.request_checks``). The denoising report of a response becomes plain fields
of its meta_info (``runtime.report``).
Goes when: upstream has a per-model request validator and scalar customized_info.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _validate_one_request(
    original: Callable[..., Any], self: Any, obj: Any, input_ids: Any
) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self)
    if checks is not None and isinstance(obj, GenerateReqInput):
        checks.check_prompt(obj.sampling_params, input_ids)
    return original(self, obj, input_ids)


async def _generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self)
    if checks is None or not isinstance(obj, GenerateReqInput):
        async for out in original(self, obj, request):
            yield out
        return
    from sglang_dllm.runtime.report import into_meta_info

    checks.check_arguments(obj)
    async for out in original(self, obj, request):
        for response in out if isinstance(out, list) else [out]:
            into_meta_info(response["meta_info"])
        yield out


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
