"""The routes of Ollama, over SGLang's OpenAI handlers."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sglang_dllm.config.resolve import DEFAULT_MAX_NEW_TOKENS
from sglang_dllm.serving.bad_request import BadRequest, refused, unreadable
from sglang_dllm.serving.forms import forms_in, read_forms
from sglang_dllm.serving.ollama import (
    CHAT,
    FORMAT,
    NUM_PREDICT,
    Translated,
    Words,
    translate,
)
from sglang_dllm.serving.raw_body import read_body
from sglang_dllm.serving.request_checks import RequestChecks
from sglang_dllm.serving.token_ids_only import refuse_text
from sglang_dllm.serving.validation import LENGTH_FIELD

VERSION = "0.9.0"
"""The version of Ollama's API. Clients compare it with the oldest
that they support."""

NEVER = "9999-12-31T23:59:59Z"
"""When a model leaves the memory, as Ollama writes times."""


class OllamaRoutes:
    """Answers of one server in Ollama's form.

    FastAPI reads a body only under the content type of JSON, which Ollama's clients
    do not send. So these routes are Starlette's.
    """

    def __init__(self, serving: Any, checks: RequestChecks) -> None:
        self._serving = serving
        self._checks = checks

    def replace(self, routes: list[Any], names: dict[str, Any]) -> None:
        """Put our routes in the place of SGLang's, under the same paths.

        Args:
            routes: of SGLang's application, changed in place.
            names: SGLang's endpoint of each of ours: chat, generate and show.
        """
        ours = {names[name]: getattr(self, name) for name in names}
        for i, route in enumerate(routes):
            endpoint = ours.get(getattr(route, "endpoint", None))
            if endpoint is not None:
                routes[i] = Route(route.path, endpoint, methods=["POST"])
        routes.append(Route("/api/version", self.version, methods=["GET"]))
        routes.append(Route("/api/ps", self.ps, methods=["GET"]))

    async def chat(self, request: Request) -> Response:
        """Answer /api/chat."""
        return await _answered(self._generate(request, is_chat=True))

    async def generate(self, request: Request) -> Response:
        """Answer /api/generate."""
        return await _answered(self._generate(request, is_chat=False))

    async def show(self, request: Request) -> Response:
        """Answer /api/show; older clients call the model ``name``."""
        return await _answered(self._show(request))

    async def version(self, _: Request) -> Response:
        """Answer /api/version."""
        return JSONResponse({"version": VERSION})

    async def ps(self, _: Request) -> Response:
        """Answer /api/ps: the models in memory. A server keeps its one model."""
        (model,) = self._serving.get_tags().models
        found = model.model_dump(exclude={"modified_at"})
        context = self._checks.manager.model_config.context_len
        found |= {"expires_at": NEVER, "size_vram": 0, "context_length": context}
        return JSONResponse({"models": [found]})

    async def _show(self, request: Request) -> Response:
        body = await read_body(request)
        body = body if isinstance(body, dict) else {}
        model = body.get("model") or body.get("name")
        if not isinstance(model, str):
            raise refused("model", model, "a string")
        return JSONResponse(self._serving.get_show(model).model_dump())

    async def _generate(self, request: Request, *, is_chat: bool) -> Response:
        self._checks.ids.arrive()
        given = await read_body(request)
        if self._checks.manager.tokenizer is None:
            refuse_text("/api/chat" if is_chat else "/api/generate", given)
        asked = translate(given, self._checks.model, is_chat=is_chat)
        words = Words(given.get("model", ""), is_chat, time.time_ns())
        if not asked.body:
            return _form(asked, [_end(words, words.part("", _now()), "load", {})])
        await read_forms(forms_in(asked.body), named=FORMAT)
        LENGTH_FIELD.set(NUM_PREDICT)
        handler, body = _openai(request, asked)
        await self._check_context(handler, body, request, asked)
        answer = await handler.handle_request(body, request)
        if isinstance(answer, StreamingResponse):
            return StreamingResponse(
                _lines(answer.body_iterator, words),
                media_type="application/x-ndjson",
                background=answer.background,
            )
        if isinstance(answer, Response):
            message = json.loads(bytes(answer.body))["message"]
            return _error(message, answer.status_code)
        return _form(asked, [_whole(answer.model_dump(), words)])

    async def _check_context(
        self, handler: Any, body: Any, request: Request, asked: Translated
    ) -> None:
        """Refuse a context that Ollama would cut the prompt or the answer for."""
        if asked.num_ctx is None:
            return
        try:
            adapted, _ = handler._convert_to_internal_request(body, request)
        except ValueError:
            return  # It fails again, and is answered, in the handler.
        prompt = adapted.input_ids
        if prompt is None:
            prompt, _ = await self._checks.manager._tokenize_texts(adapted.text)
        answer = asked.body.get("max_tokens", DEFAULT_MAX_NEW_TOKENS)
        if len(prompt) + answer > asked.num_ctx:
            least = f"at least {len(prompt) + answer}: a prompt of {len(prompt)} tokens"
            least += f" and an answer of {answer}"
            raise refused("options.num_ctx", asked.num_ctx, least)


async def _answered(answer: Awaitable[Response]) -> Response:
    """The answer, or the refusal in Ollama's form."""
    try:
        return await answer
    except BadRequest as error:
        return _error(str(error), 400)


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _openai(request: Request, asked: Translated) -> tuple[Any, Any]:
    """The handler of SGLang, and its request."""
    from sglang.srt.entrypoints.openai.protocol import (
        ChatCompletionRequest,
        CompletionRequest,
    )

    state, body = request.app.state, asked.body
    try:
        if asked.route == CHAT:
            return state.openai_serving_chat, ChatCompletionRequest(**body)
        completion = CompletionRequest(**body)
        if "max_tokens" not in body:
            # OpenAI's default of 16 tokens is not Ollama's.
            completion = completion.model_copy(update={"max_tokens": None})
        return state.openai_serving_completion, completion
    except ValidationError as error:
        raise unreadable("body", error) from None


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _form(asked: Translated, parts: list[dict[str, Any]]) -> Response:
    """A whole answer, as a stream of one line where the client asks for a stream."""
    if not asked.is_streamed:
        return JSONResponse(parts[0])
    lines = b"".join(orjson.dumps(part) + b"\n" for part in parts)
    return Response(lines, media_type="application/x-ndjson")


def _end(
    words: Words, part: dict[str, Any], reason: str, usage: dict[str, Any]
) -> dict[str, Any]:
    return words.last(part, reason, usage, time.time_ns())


def _texts(choice: dict[str, Any], key: str) -> tuple[str, str]:
    """The text and the thinking of a choice of chat (by key) or of completions."""
    if "text" in choice:
        return choice["text"], ""
    message = choice[key]
    return message.get("content") or "", message.get("reasoning_content") or ""


def _whole(answer: dict[str, Any], words: Words) -> dict[str, Any]:
    choice = answer["choices"][0]
    text, thinking = _texts(choice, "message")
    part = words.part(text, _now(), thinking)
    return _end(words, part, choice["finish_reason"], answer["usage"])


async def _lines(events: AsyncIterable[Any], words: Words) -> AsyncIterator[bytes]:
    """From the events of an OpenAI stream to Ollama's lines."""
    reason, usage = "stop", dict[str, Any]()
    async for data in _events(events):
        if "error" in data:
            yield orjson.dumps({"error": data["error"]["message"]}) + b"\n"
            return
        usage = data.get("usage") or usage
        for choice in data["choices"]:
            reason = choice["finish_reason"] or reason
            text, thinking = _texts(choice, "delta")
            if text or thinking:
                yield orjson.dumps(words.part(text, _now(), thinking)) + b"\n"
    yield orjson.dumps(_end(words, words.part("", _now()), reason, usage)) + b"\n"


async def _events(events: AsyncIterable[Any]) -> AsyncIterator[dict[str, Any]]:
    async for event in events:
        text = event if isinstance(event, str) else bytes(event).decode()
        for line in text.split("\n"):
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                yield json.loads(data)
