"""A request's token ids, lengths and options are checked before it is queued.

Every refusal is a ``BadRequest`` that names the field, the value and what is allowed.
SGLang's HTTP layer answers it with status 400. Requests of every route and of the
Python engine pass here; ``body`` sees JSON only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sglang_dllm.config.canvas_parts import CANVAS_KEY, CanvasParts
from sglang_dllm.config.resolve import (
    CUSTOM_PARAMS_KEY,
    DEFAULT_MAX_NEW_TOKENS,
    OPTIONS_PATH,
    DecodeConfig,
    Decoding,
    request_options,
    watching_of,
)
from sglang_dllm.config.watching import Watching
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.canvas import CANVAS, PART_FIELDS, check_length
from sglang_dllm.serving.fields import check_token_ids
from sglang_dllm.serving.forms import check_beside_form
from sglang_dllm.serving.token_fields import check_edits

logger = logging.getLogger(__name__)

LENGTH_FIELD = ContextVar("LENGTH_FIELD", default="max_new_tokens")
"""The field in which a client asks for the length of the answer, for errors. A route
sets it for the task of one request."""

# SGLang's scheduler keeps so many tokens of the context or of the KV pool to itself.
_RESERVED_TOKENS = 5


@dataclass(frozen=True)
class CapacityLimits:
    """How long one request may be.

    Attributes:
        max_req_input_len: the scheduler's own limit in tokens; a prompt is shorter.
        page_size: tokens of a KV page.
        max_windows: windows that one forward may have (--max-running-requests). A
            guided canvas has two.
        truncates: shorten what is too long (--allow-auto-truncate).
    """

    max_req_input_len: int
    page_size: int = 1
    max_windows: int = 2
    truncates: bool = False

    @property
    def max_prompt_len(self) -> int:
        return self.max_req_input_len - 1

    @property
    def as_clients_say(self) -> str:
        """The words and the code by which stock clients know this error."""
        most = self.max_req_input_len
        return (
            f"this model's maximum context length is {most} tokens "
            "(context_length_exceeded)"
        )

    def max_answer_len(self, prompt_len: int) -> int:
        """Longest answer that the scheduler does not shorten.

        Mirrors ``Scheduler.init_req_max_new_tokens`` for a pool as small as the limit
        allows. In SGLang 0.5.17 the two are equal with pages of one token, and with
        larger ones this is at most two pages less. SGLang 0.5.23 takes one page more
        from the limit itself.
        """
        pages = -(-prompt_len // self.page_size)
        held = self.max_req_input_len + _RESERVED_TOKENS
        return held - (pages + 1) * self.page_size


def _truncate(
    params: dict[str, Any], input_ids: MutableSequence[int], limits: CapacityLimits
) -> None:
    """Shorten a request that is too long, in place.

    A prompt that leaves no room is cut at its end, as SGLang cuts it. The answer then
    has the length that was asked for, up to half of the context. In any other case the
    answer is shortened.
    """
    answer_len = params.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS
    if len(input_ids) > limits.max_prompt_len:
        num_kept = limits.max_prompt_len - min(answer_len, limits.max_prompt_len // 2)
        logger.warning("A prompt of %d tokens is cut to %d", len(input_ids), num_kept)
        del input_ids[num_kept:]
    most = limits.max_answer_len(len(input_ids))
    if answer_len > most:
        logger.warning("An answer of %d tokens is shortened to %d", answer_len, most)
        params["max_new_tokens"] = most


def check_request(
    params: dict[str, Any],
    input_ids: MutableSequence[int] | None,
    limits: CapacityLimits,
    decode: DecodeConfig,
    facts: ModelFacts,
    canvas: CanvasParts | None = None,
) -> None:
    """Check a request and fill in what it leaves open.

    ``params["max_new_tokens"]`` is filled in where the request names none.
    ``params["custom_params"]`` becomes the resolved options, ``{"dllm": {...}}`` as
    plain JSON values, which resolve to themselves: the scheduler needs neither the
    tokenizer nor another rule to decode the request with them.

    Args:
        params: the request's sampling parameters, changed in place.
        input_ids: the prompt, which is changed only where the limits truncate.
        limits: how long a canvas may be.
        decode: the server's part of how the request is decoded.
        facts: the model's, with those of its tokenizer.
        canvas: the answer where a part of it is given. ``params`` has it no longer.

    Raises:
        BadRequest: with field, value and range.
    """
    if not input_ids:
        raise BadRequest("input_ids: the prompt is empty; expected at least 1 token")
    check_token_ids("input_ids", list(input_ids), facts.vocab_size)
    if limits.truncates and canvas is None:
        _truncate(params, input_ids, limits)
    prompt_len = len(input_ids)
    if prompt_len > limits.max_prompt_len:
        raise BadRequest(
            f"input_ids: the prompt has {prompt_len} tokens; "
            f"expected 1 to {limits.max_prompt_len}; {limits.as_clients_say}"
        )
    most = limits.max_answer_len(prompt_len)
    if canvas is not None:
        _check_canvas_len(params, prompt_len, most, canvas, limits)
    max_new_tokens = params.get("max_new_tokens")
    decoding = _resolve(
        params.get("custom_params"), decode, max_new_tokens is None, canvas is not None
    )
    if max_new_tokens is None:
        is_fixed = decoding.length.keeps_length
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, most) if is_fixed else most
        params["max_new_tokens"] = max_new_tokens
    if not 1 <= max_new_tokens <= most:
        field = LENGTH_FIELD.get()
        raise BadRequest(
            f"{field}={max_new_tokens} does not fit: with a prompt of {prompt_len} "
            f"tokens, {field} can be 1 to {most}; {limits.as_clients_say}"
        )
    with _refusing(params.get("custom_params")):
        if getattr(decoding.options, "delimiter_ids", ()) is None:
            _require_newlines(facts)
        answer_len = max_new_tokens
        if canvas is not None:
            answer_len = canvas.decoded_len(decoding.block_size)
        decoding = decoding.resolved(answer_len, facts)
    delimiter_ids = getattr(decoding.options, "delimiter_ids", None) or []
    check_token_ids(f"{OPTIONS_PATH}.delimiter_ids", delimiter_ids, facts.vocab_size)
    algorithm = decoding.algorithm
    if limits.max_windows < 2 and algorithm.is_guided(decoding.options):
        raise refused(
            f"{OPTIONS_PATH}.cfg_scale",
            decoding.to_dict().get("cfg_scale", algorithm.name),
            "0 on a server with --max-running-requests 1",
        )
    watching = _watching(params.get("custom_params"))
    edits = check_edits(params, facts, LENGTH_FIELD.get())
    has_canvas = canvas is not None
    check_beside_form(params, decoding.length.name, edits, has_canvas=has_canvas)
    options = {**decoding.to_dict(), **watching.to_dict(), **edits}
    if canvas is not None:
        options[CANVAS_KEY] = canvas.parts
    params["custom_params"] = {CUSTOM_PARAMS_KEY: options}


def _check_canvas_len(
    params: dict[str, Any],
    prompt_len: int,
    most: int,
    canvas: CanvasParts,
    limits: CapacityLimits,
) -> None:
    """Fill in the length of an answer that is given in part."""
    check_length(LENGTH_FIELD.get(), params.get("max_new_tokens"), canvas)
    length, field = len(canvas.template), " and ".join(PART_FIELDS.get()) or CANVAS
    if length > most:
        raise BadRequest(
            f"{field}: the canvas has {length} tokens behind a prompt of "
            f"{prompt_len}; expected at most {most}; {limits.as_clients_say}"
        )
    params["max_new_tokens"] = canvas.num_shown


def check_watching(params: Mapping[str, Any], *, is_streamed: bool) -> None:
    """Refuse a stream of drafts where the answer is no stream.

    Args:
        params: with ``custom_params``, of any route.

    Raises:
        BadRequest: naming field, value and range.
    """
    stream = _watching(params.get("custom_params")).stream
    if stream is not None and not is_streamed:
        raise refused(f"{OPTIONS_PATH}.stream", "draft", "it with stream=true")


def refuse_watching(params: Mapping[str, Any], there: str) -> None:
    """Refuse what an answer of another form would leave out.

    Args:
        there: the routes that have a place for it.

    Raises:
        BadRequest: naming field, value and range.
    """
    for key, value in _watching(params.get("custom_params")).to_dict().items():
        raise refused(f"{OPTIONS_PATH}.{key}", value, f"it on {there}")


def _watching(custom_params: Mapping[str, Any] | None) -> Watching:
    try:
        return watching_of(custom_params)
    except OptionError as error:
        raise refused(
            f"{OPTIONS_PATH}.{error.key}", error.value, error.expected
        ) from None


def _require_newlines(facts: ModelFacts) -> None:
    """Refuse AdaBlock's default where no newline is known: it would be no delimiter."""
    if not facts.newline_ids:
        expected = "token ids: the server knows no newline token"
        raise OptionError("delimiter_ids", None, expected)


def _resolve(
    custom_params: dict[str, Any] | None,
    decode: DecodeConfig,
    is_open: bool,
    has_canvas: bool,
) -> Decoding:
    """The request's options; unknown ones are refused.

    Args:
        is_open: the request does not say how long its answer may be.
        has_canvas: it gives a part of its answer.
    """
    for key, value in (custom_params or {}).items():
        if key != CUSTOM_PARAMS_KEY:
            raise refused(f"custom_params.{key}", value, f"{OPTIONS_PATH} only")
        if value is not None and not isinstance(value, dict):
            raise refused(OPTIONS_PATH, value, "an object")
    resolve = decode.resolve_open if is_open else decode.resolve
    if has_canvas:
        resolve = decode.resolve_given
    with _refusing(custom_params):
        return resolve(request_options(custom_params))


@contextmanager
def _refusing(custom_params: dict[str, Any] | None) -> Iterator[None]:
    """Answer status 400 where an option is wrong, by its place in the request."""
    try:
        yield
    except OptionError as error:
        field = f"{OPTIONS_PATH}.{error.key}"
        if error.key not in request_options(custom_params) and " " not in error.key:
            field += " (the server's default)"
        raise refused(field, error.value, error.expected) from None
