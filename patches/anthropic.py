"""sglang.srt.entrypoints.anthropic.serving

Upstream: a stream answers 200 before its request is checked. SGLang 0.5.17 answers a
prompt that the chat template refuses, or that has no template, with status 500.
Ours: a request is checked before its stream begins; such a prompt is a status 400.
Goes when: upstream checks a streamed request before it answers, as it does for chat.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _generate_anthropic_stream(
    original: Callable[..., Any],
    self: Any,
    adapted_request: Any,
    processed_request: Any,
    anthropic_request: Any,
    raw_request: Any,
) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self.openai_serving_chat.tokenizer_manager)
    if checks is not None:
        checks.check_early(adapted_request)
    return original(
        self, adapted_request, processed_request, anthropic_request, raw_request
    )


def _error_response(
    original: Callable[..., Any],
    self: Any,
    status_code: int,
    error_type: str,
    message: str,
    exception_name: str | None = None,
) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    error = sys.exc_info()[1]
    is_refusal = status_code == 500 and isinstance(error, ValueError)
    if is_refusal and checks_of(self.openai_serving_chat.tokenizer_manager) is not None:
        return original(self, 400, "invalid_request_error", str(error))
    return original(self, status_code, error_type, message, exception_name)


_SERVING = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"

HOOKS = (
    Hook(
        target=f"{_SERVING}._generate_anthropic_stream",
        fn=_generate_anthropic_stream,
        why="a stream answers 200 before its request is checked",
        contract=(
            *("self", "adapted_request", "processed_request", "anthropic_request"),
            "raw_request",
        ),
        remove_when="upstream checks a streamed request before it answers",
    ),
    Hook(
        target=f"{_SERVING}._error_response",
        fn=_error_response,
        why="a prompt that the chat template refuses is a status 500",
        contract=("self", "status_code", "error_type", "message", "exception_name"),
        remove_when="upstream answers every ValueError of a request with status 400",
    ),
)
