"""``dllm.canvas``: the parts of an answer that a request gives, and the gaps to fill.

A part is text (a string, or ``{"text": ...}``), token ids (``{"ids": [...]}``) or masks
(``{"mask": n}``). A draft is text or ids with the spans that are to be masked again
(``"mask": [[start, end], ...]``). Text behind the last gap may be kept out of the
answer (``"shown": false``), which is how OpenAI's ``suffix`` is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from sglang_dllm.config.canvas_parts import CANVAS_KEY, MASK, CanvasParts
from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, OPTIONS_PATH, dllm_object
from sglang_dllm.serving.bad_request import refused
from sglang_dllm.serving.fields import check_token_ids

CANVAS = f"{OPTIONS_PATH}.{CANVAS_KEY}"

PART_FIELDS = ContextVar[tuple[str, ...]]("PART_FIELDS", default=())
"""The fields in which a client gives the parts, for errors; empty for ``CANVAS``. A
route sets it for the task of one request."""

_PART = 'a string, {"text": ...}, {"ids": [...]} or {"mask": n}'
_SPANS = "ascending spans [start, end] that do not overlap, with 0 <= start < end"

Spans = list[tuple[int, int]]


def canvas_of(custom_params: Any) -> Any:
    """The value of ``dllm.canvas`` as the client gave it, None without one."""
    return dllm_object(custom_params).get(CANVAS_KEY)


def with_canvas(
    custom_params: Mapping[str, Any] | None, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """``custom_params`` with another canvas, unless its options are no object."""
    given = dict(custom_params or {})
    options = given.get(CUSTOM_PARAMS_KEY) or {}
    if not isinstance(options, dict):
        return given
    return {**given, CUSTOM_PARAMS_KEY: {**options, CANVAS_KEY: parts}}


def infill_parts(num_masks: int, suffix: str) -> list[dict[str, Any]]:
    """The canvas of a completion in front of a suffix."""
    return [{"mask": num_masks}, {"text": suffix, "shown": False}]


def read_canvas(
    given: Any, tokenizer: Any, vocab_size: int, max_len: int
) -> CanvasParts:
    """The canvas that a request asks for.

    Each part is tokenized alone, and nothing is added to it.

    Args:
        given: the value of ``dllm.canvas``.
        tokenizer: of transformers; None where the server has none.
        vocab_size: token ids from 0 to vocab_size - 1 exist.
        max_len: the most positions of any canvas.

    Raises:
        BadRequest: naming field, value and range.
    """
    if not isinstance(given, list) or not given:
        raise refused(CANVAS, given, f"a list of at least 1 part: {_PART}")
    template: list[int] = []
    num_shown, names = 0, PART_FIELDS.get()
    for i, part in enumerate(given):
        field = names[i] if names else f"{CANVAS}[{i}]"
        fields = {"text": part} if isinstance(part, str) else part
        if not isinstance(fields, dict):
            raise refused(field, part, _PART)
        fields = {key: value for key, value in fields.items() if value is not None}
        shown = fields.pop("shown", True)
        if not isinstance(shown, bool):
            raise refused(f"{field}.shown", shown, "true or false")
        found = _ids_of(field, fields, tokenizer, vocab_size, max_len)
        template += found
        if len(template) > max_len:
            raise refused(field, part, f"at most {max_len} positions up to here")
        if shown and len(template) > num_shown + len(found):
            hidden = "nothing before a part that is shown"
            raise refused(f"{CANVAS}[{i - 1}].shown", False, hidden)
        if not shown and MASK in found:
            raise refused(f"{field}.shown", shown, "true for masks")
        num_shown = len(template) if shown else num_shown
    if MASK not in template:
        raise refused(CANVAS, given, "at least 1 mask")
    return CanvasParts(tuple(template), num_shown)


def _inside(field: str, key: str) -> str:
    return f"{field}.{key}" if field.startswith(CANVAS) else field


def _ids_of(
    field: str, part: dict[str, Any], tokenizer: Any, vocab_size: int, max_len: int
) -> list[int]:
    """The template of one part."""
    kinds = part.keys() & {"text", "ids"}
    unknown = part.keys() - {"text", "ids", "mask"}
    if unknown or len(kinds) > 1 or not part:
        raise refused(field, part, _PART)
    if not kinds:
        num = part["mask"]
        if type(num) is not int or not 1 <= num <= max_len:
            raise refused(_inside(field, "mask"), num, f"an integer, 1 to {max_len}")
        return [MASK] * num
    (kind,) = kinds
    if kind == "ids":
        ids = _checked_ids(_inside(field, "ids"), part["ids"], vocab_size)
        spans = _spans(_inside(field, "mask"), part.get("mask", []), len(ids))
        return _masked(ids, [(i, i + 1) for i in range(len(ids))], spans)
    text = part["text"]
    if not isinstance(text, str) or not text:
        raise refused(_inside(field, "text"), text, "a non-empty string")
    if tokenizer is None:
        raise refused(_inside(field, "text"), text, "ids: the server has no tokenizer")
    spans = _spans(_inside(field, "mask"), part.get("mask", []), len(text))
    if not spans:
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids, places = _places(_inside(field, "mask"), tokenizer, text)
    return _masked(ids, places, spans)


def _checked_ids(field: str, ids: Any, vocab_size: int) -> list[int]:
    is_list = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not is_list or not ids:
        raise refused(field, ids, "a list of at least 1 token id")
    check_token_ids(field, ids, vocab_size)
    return list(ids)


def _spans(field: str, given: Any, length: int) -> Spans:
    if not isinstance(given, list):
        raise refused(field, given, _SPANS)
    spans: Spans = []
    for span in given:
        is_pair = isinstance(span, list) and len(span) == 2
        if not is_pair or any(type(bound) is not int for bound in span):
            raise refused(field, span, _SPANS)
        start, end = span
        least = spans[-1][1] if spans else 0
        if not least <= start < end <= length:
            raise refused(field, span, f"{_SPANS} <= {length}")
        spans.append((start, end))
    return spans


def _places(field: str, tokenizer: Any, text: str) -> tuple[list[int], Spans]:
    """The tokens of a text, and the characters of each.

    Some tokenizers leave a space out of the place of the token that it belongs to.
    Characters between two tokens therefore count to the second one.
    """
    if not getattr(tokenizer, "is_fast", False):
        expected = "spans of ids: the tokenizer does not say where its tokens are"
        raise refused(field, text, expected)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [0, *(end for _, end in found["offset_mapping"])]
    starts = [start for start, _ in found["offset_mapping"]]
    places = [
        (min(before, start), end)
        for (before, end), start in zip(pairwise(ends), starts, strict=True)
    ]
    return list(found["input_ids"]), places


def _masked(ids: list[int], places: Spans, spans: Spans) -> list[int]:
    """The ids, with a mask for each that a span touches."""
    length = max((end for _, end in [*places, *spans]), default=0)
    touched = bytearray(length)
    for start, end in spans:
        touched[start:end] = b"x" * (end - start)
    return [
        MASK if any(touched[start:end]) else token
        for token, (start, end) in zip(ids, places, strict=True)
    ]


def check_length(field: str, asked: int | None, canvas: CanvasParts) -> None:
    """Refuse a length of the answer that differs from the canvas's.

    Raises:
        BadRequest: naming field, value and range.
    """
    if asked not in (None, canvas.num_shown):
        num = canvas.num_shown
        raise refused(field, asked, f"nothing: {CANVAS} has {num} positions to show")


def with_suffix(body: dict[str, Any], default_len: int) -> dict[str, Any]:
    """The body of a completion with its suffix as text behind the canvas.

    Args:
        body: changed: it loses its suffix.
        default_len: tokens of the canvas where the body says nothing.

    Raises:
        BadRequest: it has both a suffix and a canvas.
    """
    suffix = body.pop("suffix", "")
    if not suffix:
        return body
    if canvas_of(body.get("custom_params")) is not None:
        raise refused("suffix", suffix, f"nothing beside {CANVAS}")
    parts = infill_parts(body.get("max_tokens", default_len), suffix)
    return {**body, "custom_params": with_canvas(body.get("custom_params"), parts)}
