"""sglang.srt.entrypoints.openai: chat and completions

Upstream: an answer and the parts of a stream have the fields that SGLang knows. A part
without new text is not sent, nor are the log-probabilities of its tokens.
Ours: the history of a watched canvas comes in an object ``dllm`` beside ``choices``
(``serving.watched``): in each part of a stream of drafts, and in answers with a trace.
All other answers pass as they are.
Tool calls: the parsers of a stream get a part in pieces, because a part may have many
tokens, and a parser takes one step for each part. A forced call is one call, and a
strict function's call satisfies its schema (``serving.tool_calls``).
Goes when: upstream lets a model add fields to an answer and to the parts of a stream.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


async def _generate_stream_content(
    original: Callable[..., Any],
    self: Any,
    content: Any,
    index: int,
    request: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[str]:
    from sglang_dllm.serving.watched import extension_of, with_extension

    extension = extension_of(content["meta_info"]) if _is_ours(self) else None
    logprobs = kwargs.get("choice_logprobs") if _is_ours(self) else None
    async for chunk in original(self, content, index, request, *args, **kwargs):
        logprobs = None  # SGLang puts them into its first part, if it sends one.
        if extension is not None:
            chunk, extension = with_extension(chunk, extension), None
        yield chunk
    if extension is not None or logprobs is not None:
        from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

        chunk = build_sse_content(
            chunk_id=content["meta_info"]["id"],
            created=kwargs.get("created") or int(time.time()),
            model=request.model,
            index=index,
            content="",
            logprobs=logprobs,
        )
        yield chunk if extension is None else with_extension(chunk, extension)


async def _process_tool_call_stream(
    original: Callable[..., Any],
    self: Any,
    index: int,
    delta: str,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[str]:
    pieces = _PIECE.findall(delta) or [delta] if _is_ours(self) else [delta]
    last = len(pieces) - 1
    for i, piece in enumerate(pieces):
        more = {**kwargs, "flush": False} if i < last and "flush" in kwargs else kwargs
        async for chunk in original(self, index, piece, *args, **more):
            yield chunk


def _process_messages(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    from sglang_dllm.serving.tool_calls import asks_for_calls, form_of_calls

    found = original(self, request, *args, **kwargs)
    choice = getattr(request, "tool_choice", None)
    if choice is None or not _is_ours(self) or not self.tool_call_parser:
        return found
    tools = self._effective_tools(request) or []
    if asks_for_calls(choice, [tool.function for tool in tools]):
        is_parallel = request.parallel_tool_calls is not False
        form = form_of_calls(
            self.tool_call_parser, tools, choice, is_parallel=is_parallel
        )
        found.tool_call_constraint = form
    return found


def _process_logprobs_tokens(
    original: Callable[..., Any],
    self: Any,
    logprobs: Any,
    use_token_index: bool = False,
) -> Any:
    return original(self, logprobs, use_token_index or _is_ours(self))


async def _generate_completion_stream(
    original: Callable[..., Any],
    self: Any,
    adapted_request: Any,
    request: Any,
    raw_request: Any,
) -> AsyncIterator[str]:
    from sglang_dllm.serving.watched import EXTENSION, with_extension

    async for chunk in original(self, adapted_request, request, raw_request):
        extension = EXTENSION.get() if _is_ours(self) else None
        if extension is not None:
            EXTENSION.set(None)
            chunk = with_extension(chunk, extension)
        yield chunk


def _build_response(
    original: Callable[..., Any], self: Any, request: Any, ret: Any, created: int
) -> Any:
    from sglang_dllm.serving.watched import extended

    response = original(self, request, ret, created)
    return extended(response, ret) if _is_ours(self) else response


def _is_ours(serving: Any) -> bool:
    from sglang_dllm.serving.request_checks import checks_of

    return checks_of(serving.tokenizer_manager) is not None


_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
"""Text that is about a token, as SGLang's parsers of tool calls expect it."""

_OPENAI = "sglang.srt.entrypoints.openai"
_CHAT = f"{_OPENAI}.serving_chat.OpenAIServingChat"
_COMPLETION = f"{_OPENAI}.serving_completions.OpenAIServingCompletion"
_REMOVE_WHEN = "upstream lets a model add fields to the answers of OpenAI's routes"
_TRACE = "an answer has no place for the history of its canvas"

HOOKS = (
    Hook(
        target=f"{_CHAT}._process_tool_call_stream",
        fn=_process_tool_call_stream,
        why="the parsers of streamed tool calls lose arguments that come in one part "
        "with the name, and calls that come in one part with another",
        contract=None,
        remove_when="upstream's parsers take several tokens at a time",
    ),
    Hook(
        target=f"{_CHAT}._process_messages",
        fn=_process_messages,
        why="a forced call may be of another function than the named one, with any "
        "arguments, and text may follow it; a strict function with a parser of other "
        "words is served without its schema",
        contract=None,
        remove_when="upstream's constraint of a forced call is one call by its schema",
    ),
    Hook(
        target=f"{_CHAT}._generate_stream_content",
        fn=_generate_stream_content,
        why="a stream of drafts sends a part for each change of its canvas, also where "
        "no text is final yet; log-probabilities of tokens without text are dropped",
        contract=None,
        remove_when=_REMOVE_WHEN,
    ),
    Hook(
        target=f"{_CHAT}._process_logprobs_tokens",
        fn=_process_logprobs_tokens,
        why="a part of a stream with several tokens has the alternatives of its first "
        "one for all",
        contract=("self", "logprobs", "use_token_index"),
        remove_when="SGLang 0.5.17 is no longer supported",
        unless=f"{_CHAT}._build_token_logprobs_from_raw",
        replaced_by={"0.5.23": "SGLang takes the alternatives of each token"},
    ),
    Hook(
        target=f"{_COMPLETION}._generate_completion_stream",
        fn=_generate_completion_stream,
        why="the parts of a stream have no place for the history of a canvas",
        contract=("self", "adapted_request", "request", "raw_request"),
        remove_when=_REMOVE_WHEN,
    ),
    Hook(
        target=f"{_CHAT}._build_chat_response",
        fn=_build_response,
        why=_TRACE,
        contract=("self", "request", "ret", "created"),
        remove_when=_REMOVE_WHEN,
    ),
    Hook(
        target=f"{_COMPLETION}._build_completion_response",
        fn=_build_response,
        why=_TRACE,
        contract=("self", "request", "ret", "created"),
        remove_when=_REMOVE_WHEN,
    ),
)
