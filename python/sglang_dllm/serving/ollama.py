"""Ollama's chat and completions, answered by SGLang's OpenAI handlers.

A body of Ollama becomes a body of OpenAI, which passes the same checks and gives the
same text. The answer becomes Ollama's. Errors name Ollama's fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.body import ServedModel, check_body
from sglang_dllm.serving.canvas import CANVAS, canvas_of
from sglang_dllm.serving.foreign_fields import MODIFIERS, NEUTRAL, NOT_IMPLEMENTED
from sglang_dllm.serving.forms import FIELD, json_format
from sglang_dllm.serving.validation import refuse_watching

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NUM_PREDICT, FORMAT = "options.num_predict", "format"

_SAMPLING = ("temperature", "top_p", "top_k", "stop", "seed")
_OPEN = {"num_predict": (-1, -2), "seed": (-1,)}
"""Values of an option that say the same as no option."""

_LOADING = frozenset(
    {
        *("numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv"),
        *("logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only"),
        *("num_thread", "num_keep", "rope_frequency_base", "rope_frequency_scale"),
    }
)
"""Options of how Ollama loads a model, or shifts a context that is too long."""

_DROPPED = (
    *("options", "keep_alive", "truncate", "shift", "raw", "system", "prompt"),
    FORMAT,
)
_NO_VALUE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("suffix", "template"), ("",)),
    **dict.fromkeys(("images", "tools", "context"), ([],)),
    "think": (False,),
    **dict.fromkeys(("width", "height", "steps"), ()),
}
"""Fields that are not implemented, with the values beside null that ask for nothing."""


@dataclass(frozen=True)
class Translated:
    """A request of Ollama in OpenAI's words.

    Attributes:
        route: of OpenAI.
        body: checked; empty where the request asks for no text: Ollama's clients load
            and unload a model with such a request.
        is_streamed: Ollama streams unless the request says no.
        num_ctx: tokens that the prompt and the answer must fit into; None: no limit.
    """

    route: str
    body: dict[str, Any]
    is_streamed: bool
    num_ctx: int | None


def translate(given: Any, model: ServedModel, *, is_chat: bool) -> Translated:
    """A body of /api/chat or of /api/generate.

    Raises:
        BadRequest: status 400, naming Ollama's field, value and range.
    """
    if not isinstance(given, dict):
        raise refused("body", given, "a JSON object")
    data = {key: value for key, value in given.items() if value is not None}
    for key in _NO_VALUE.keys() & data.keys():
        if data[key] not in _NO_VALUE[key] or data[key] is True:
            raise refused(key, data.pop(key), f"nothing: {NOT_IMPLEMENTED}")
    options = _options(data.get("options", {}))
    is_streamed = _boolean(data, "stream", True)
    body = {key: data[key] for key in data if key not in (*_DROPPED, *_NO_VALUE)}
    num_ctx = options.pop("num_ctx", None)
    if "num_predict" in options:
        options["max_tokens"] = options.pop("num_predict")
    body |= options | {"stream": is_streamed, "model": data.get("model", "")}
    body |= _form(data.get(FORMAT) or None)
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    is_raw = not is_chat and _boolean(data, "raw", False)
    if is_raw:
        if data.get("system"):
            raise refused("system", data["system"], "nothing beside raw: true")
        body["prompt"] = _text(data, "prompt")
    elif is_chat:
        body["messages"] = _messages(data)
    else:
        texts = {"system": _text(data, "system"), "user": _text(data, "prompt")}
        body["messages"] = [
            {"role": role, "content": text} for role, text in texts.items() if text
        ]
    route = COMPLETIONS if is_raw else CHAT
    asks_nothing = not (data["messages"] if is_chat else _text(data, "prompt"))
    if asks_nothing:
        return Translated(route, {}, is_streamed, num_ctx)
    canvas = canvas_of(body.get("custom_params"))
    if canvas is not None:
        raise refused(CANVAS, canvas, f"it on {CHAT}, {COMPLETIONS} or /generate")
    try:
        body = check_body(route, body, model)
        refuse_watching(body, f"{CHAT}, {COMPLETIONS} and /generate")
        return Translated(route, body, is_streamed, num_ctx)
    except BadRequest as error:
        raise BadRequest(_in_ollamas_words(str(error), options)) from None


def _options(given: Any) -> dict[str, Any]:
    """The options that say something, by Ollama's names."""
    if not isinstance(given, dict):
        raise refused("options", given, "an object")
    found = {}
    for key, value in given.items():
        if value is None or key in _LOADING or _is_one_of(value, _OPEN.get(key, ())):
            continue
        known = (*_SAMPLING, "num_predict", "num_ctx")
        if key not in known and key not in NEUTRAL and key not in MODIFIERS:
            names = ", ".join(known)
            raise BadRequest(f"options.{key} is not a known option; expected {names}")
        if key == "num_ctx" and (type(value) is not int or value < 1):
            raise refused("options.num_ctx", value, "an integer of 1 or more")
        found[key] = value
    return found


def _form(given: Any) -> dict[str, Any]:
    """OpenAI's field of a form: Ollama's is the word json, or a schema."""
    if given is None:
        return {}
    if given == "json":
        return {FIELD: {"type": "json_object"}}
    if not isinstance(given, dict):
        raise refused(FORMAT, given, "'json' or a JSON schema")
    return {FIELD: json_format(FORMAT, given)}


def _is_one_of(value: Any, values: tuple[int, ...]) -> bool:
    return type(value) is int and value in values


def _boolean(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise refused(key, value, "true or false")
    return value


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise refused(key, value, "a string")
    return value


def _messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    messages = data.setdefault("messages", [])
    if not isinstance(messages, list):
        raise refused("messages", messages, "a list of message objects")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise refused(f"messages[{i}]", message, "an object")
        for key in ("images", "tool_calls"):
            if message.get(key):
                raise refused(f"messages[{i}].{key}", message[key], "nothing: text")
        known = {"role": message.get("role"), "content": message.get("content") or ""}
        if message.get("thinking"):
            known["reasoning_content"] = message["thinking"]
        found.append(known)
    return found


def _in_ollamas_words(error: str, options: Mapping[str, Any]) -> str:
    match = re.match(r"\w+", error)
    name = match.group() if match else ""
    if name not in options:
        return error
    ours = NUM_PREDICT if name == "max_tokens" else f"options.{name}"
    return ours + error.removeprefix(name)


@dataclass(frozen=True)
class Words:
    """The form of an answer of one request.

    Attributes:
        model: as the request names it.
        is_chat: the answer of /api/chat is a message.
        started: time in nanoseconds.
    """

    model: str
    is_chat: bool
    started: int

    def part(self, text: str, created_at: str, thinking: str = "") -> dict[str, Any]:
        """A piece of the text."""
        found: dict[str, Any] = {"model": self.model, "created_at": created_at}
        more = {"thinking": thinking} if thinking else {}
        if self.is_chat:
            found["message"] = {"role": "assistant", "content": text, **more}
        else:
            found |= {"response": text, **more}
        return {**found, "done": False}

    def last(
        self, part: dict[str, Any], reason: str, usage: Mapping[str, Any], now: int
    ) -> dict[str, Any]:
        """The piece that ends the answer.

        A canvas is computed as a whole, so that the prompt takes no time of its own.

        Args:
            reason: stop, length or load.
            usage: OpenAI's counts; durations are in nanoseconds.
        """
        took = now - self.started
        return {
            **part,
            "done": True,
            "done_reason": reason,
            "total_duration": took,
            "load_duration": 0,
            "prompt_eval_count": usage.get("prompt_tokens", 0),
            "prompt_eval_duration": 0,
            "eval_count": usage.get("completion_tokens", 0),
            "eval_duration": took,
        }
