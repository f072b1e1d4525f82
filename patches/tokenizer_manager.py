"""sglang.srt.managers.tokenizer_manager

Upstream: checks lengths only; a token id outside the vocabulary ends the scheduler,
and sampling fields its dLLMs ignore pass without a word.
Ours: requests are checked at the door (``serving.door``), and the denoising report
of a response becomes plain fields of its meta_info (``scheduling.report``).
Goes when: upstream has a per-model request validator and scalar customized_info.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang_dllm.hooks import Hook


def _is_ours(manager: Any) -> bool:
    from sglang_dllm.scheduling.dllm_config import is_full_attention

    return is_full_attention(manager.model_config.hf_config)


def _validate_one_request(
    original: Callable[..., Any], self: Any, obj: Any, input_ids: Any
) -> Any:
    if _is_ours(self):
        from sglang_dllm.serving.door import check_request

        check_request(
            obj.sampling_params,
            input_ids,
            self.model_config.vocab_size,
            # The scheduler keeps five tokens of the pool and two of the context.
            self.max_req_input_len + 4,
        )
    return original(self, obj, input_ids)


async def _generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    if not _is_ours(self):
        async for out in original(self, obj, request):
            yield out
        return
    from sglang_dllm.scheduling.report import into_meta_info

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
        why="customized_info carries lists of one value per token only",
        contract=("self", "obj", "request"),
        remove_when="upstream carries scalars of a request to meta_info",
    ),
)
