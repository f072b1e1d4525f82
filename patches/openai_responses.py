"""sglang.srt.entrypoints.openai: responses

Upstream: takes two tokens from the length that a client asks for, or asks for the
whole context. A stream answers 200 before its request is checked. SGLang 0.5.17 names
the counts of usage as chat does.
The form that an answer must have (``text.format``) is dropped there. A wrong item of
the input brings a traceback into the log.
Ours: the length is the one that the client asks for, and chat's default without one. An
answer has its form. A request is checked before its stream begins. Usage has the names
of the responses API. An input that SGLang cannot read is a status 400 like any other.
Goes when: upstream leaves the length alone, and checks a stream before it answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _to_sampling_params(
    original: Callable[..., Any],
    self: Any,
    default_max_tokens: int | None = None,
    default_params: dict[str, Any] | None = None,
    stop: Any = None,
    tool_call_constraint: Any = None,
) -> Any:
    from sglang_dllm.serving.chat_like import text_schema
    from sglang_dllm.serving.request_checks import checks_of_server

    params = original(
        self, default_max_tokens, default_params, stop, tool_call_constraint
    )
    if checks_of_server() is not None:
        params["max_new_tokens"] = self.max_output_tokens
        schema = text_schema()
        if schema is not None:
            params["json_schema"] = schema
    return params


def _generate_with_builtin_tools(
    original: Callable[..., Any],
    self: Any,
    request_id: str,
    request_prompt: Any,
    adapted_request: Any,
    sampling_params: Any,
    context: Any,
    raw_request: Any = None,
    priority: int | None = None,
    **kwargs: Any,
) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self.tokenizer_manager)
    if checks is not None:
        checks.check_early(adapted_request)
    return original(
        self,
        request_id,
        request_prompt,
        adapted_request,
        sampling_params,
        context,
        raw_request,
        priority,
        **kwargs,
    )


async def _make_request(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    from fastapi import HTTPException

    from sglang_dllm.serving.bad_request import unreadable
    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self.tokenizer_manager)
    if checks is None:
        return await original(self, *args, **kwargs)
    try:
        return await original(self, *args, **kwargs)
    except Exception as error:
        # It makes a prompt of what the client sent, and of nothing else. SGLang would
        # log a ValueError, which a BadRequest is.
        refusal = unreadable("input", error)
        checks.refusals.add("body", refusal)
        raise HTTPException(400, str(refusal)) from None


async def _create_responses(
    original: Callable[..., Any], self: Any, request: Any, raw_request: Any = None
) -> Any:
    return _with_usage(self, await original(self, request, raw_request))


async def _retrieve_responses(
    original: Callable[..., Any], self: Any, response_id: str
) -> Any:
    return _with_usage(self, await original(self, response_id))


def _with_usage(serving: Any, answer: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import ResponsesResponse

    from sglang_dllm.serving.chat_like import TEXT_FORMAT, response_usage
    from sglang_dllm.serving.request_checks import checks_of

    if checks_of(serving.tokenizer_manager) is None:
        return answer
    if not isinstance(answer, ResponsesResponse) or answer.usage is None:
        return answer
    usage = response_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens)
    form = TEXT_FORMAT.get()
    text = {} if form is None else {"text": {"format": form}}
    return {**answer.model_dump(), **text, "usage": usage}


_SERVING = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
_PROTOCOL = "sglang.srt.entrypoints.openai.protocol"
_SERIALIZE = f"{_PROTOCOL}.ResponsesResponse._serialize_usage"
_BY_SGLANG = {"0.5.23": "SGLang's own names of the counts"}

HOOKS = (
    Hook(
        target=f"{_PROTOCOL}.ResponsesRequest.to_sampling_params",
        fn=_to_sampling_params,
        why="the canvas is two tokens shorter than asked for, and the whole context "
        "where no length is asked for",
        contract=(
            *("self", "default_max_tokens", "default_params", "stop"),
            "tool_call_constraint",
        ),
        remove_when="upstream leaves max_output_tokens as it is",
    ),
    Hook(
        target=f"{_SERVING}._generate_with_builtin_tools",
        fn=_generate_with_builtin_tools,
        why="a stream answers 200 before its request is checked",
        contract=(
            *("self", "request_id", "request_prompt", "adapted_request"),
            *("sampling_params", "context", "raw_request", "priority", "kwargs"),
        ),
        remove_when="upstream checks a streamed request before it answers",
    ),
    Hook(
        target=f"{_SERVING}._make_request",
        fn=_make_request,
        why="a wrong item of the input is logged as if the server had failed",
        contract=None,
        remove_when="upstream tells a client's errors from its own",
    ),
    Hook(
        target=f"{_SERVING}.create_responses",
        fn=_create_responses,
        why="usage has the names of chat, which clients of this route do not read",
        contract=("self", "request", "raw_request"),
        remove_when="SGLang 0.5.17 is no longer supported",
        unless=_SERIALIZE,
        replaced_by=_BY_SGLANG,
    ),
    Hook(
        target=f"{_SERVING}.retrieve_responses",
        fn=_retrieve_responses,
        why="the same for a response that is asked for later",
        contract=("self", "response_id"),
        remove_when="SGLang 0.5.17 is no longer supported",
        unless=_SERIALIZE,
        replaced_by=_BY_SGLANG,
    ),
)
