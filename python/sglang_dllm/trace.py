"""The trace of a denoising: the JSON of ``dllm.trace``, of the page and of ``replay``.

docs/watching.md has the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dllm.decoding.history import FORMAT

_MOST = 1 << 20
"""Positions of a canvas. A wrong file must not take all memory."""


class Committed(NamedTuple):
    """A committed position.

    Attributes:
        position: of the answer, from 0.
        text: of the token alone; None where the server has no tokenizer.
        confidence: the probability of the token in that forward, 0 to 1. None where a
            rule filled the position, as behind an EOS.
    """

    position: Annotated[int, Field(ge=0)]
    token: int
    text: str | None
    confidence: Annotated[float, Field(ge=0, le=1)] | None


class _Part(BaseModel):
    # A later version may add fields.
    model_config = ConfigDict(frozen=True, extra="ignore")


class TraceStep(_Part):
    """One forward and the commit behind it, or a change of length behind a forward.

    Attributes:
        taken_back: positions that are masks again.
        resized: ``[at, removed, inserted]``: positions taken out there, and masks put
            in. None where the step is a forward.
    """

    forward: Annotated[int, Field(ge=0)]
    committed: list[Committed]
    taken_back: list[Annotated[int, Field(ge=0)]] = []
    resized: tuple[int, int, int] | None = None


class Trace(_Part):
    """The history of one canvas.

    Attributes:
        dllm: the options.
        answer_len: positions of the answer before the first step.
        pinned: ``[position, token, text]``: text that the request gave.
    """

    version: Literal[1]
    dllm: dict[str, Any] = {}
    prompt_len: Annotated[int, Field(ge=0)] = 0
    answer_len: Annotated[int, Field(ge=0, le=_MOST)]
    pinned: list[tuple[int, int, str | None]] = []
    steps: list[TraceStep]


class TraceError(ValueError):
    """A file holds no trace."""


def load_trace(path: Path) -> Trace:
    """Read a trace, or an answer of a server that has one.

    Raises:
        TraceError: one line that says what is wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise TraceError(f"{path}: no JSON") from None
    for keys in ((), ("dllm", "trace"), ("meta_info", "dllm", "trace")):
        part = found
        for key in keys:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get("format") == FORMAT:
            return _parsed(path, part)
    raise TraceError(f'{path}: no trace; expected "format": "{FORMAT}"')


def _parsed(path: Path, part: dict[str, Any]) -> Trace:
    try:
        trace = Trace.model_validate(part)
        canvases(trace)
        return trace
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise TraceError(f"{path}: {where}: {first['msg']}") from None


class Cell(NamedTuple):
    """A position of a canvas that is no mask.

    Attributes:
        forward: that committed it; 0 for pinned text.
    """

    text: str
    confidence: float | None
    forward: int


Canvas = list[Cell | None]
"""The positions of an answer; None is a mask."""


def canvases(trace: Trace) -> list[tuple[TraceStep | None, Canvas]]:
    """The canvas before the first step and behind each one.

    Raises:
        TraceError: a step names a position that the canvas does not have.
    """
    canvas: Canvas = [None] * trace.answer_len
    found: list[tuple[TraceStep | None, Canvas]] = []
    for position, token, text in trace.pinned:
        _put(canvas, position, Cell(_shown(token, text), None, 0))
    found.append((None, list(canvas)))
    for step in trace.steps:
        for position in step.taken_back:
            _put(canvas, position, None)
        for one in step.committed:
            text = _shown(one.token, one.text)
            _put(canvas, one.position, Cell(text, one.confidence, step.forward))
        if step.resized is not None:
            at, removed, inserted = step.resized
            if not (0 <= at <= at + removed <= len(canvas) and 0 <= inserted <= _MOST):
                raise TraceError(f"forward {step.forward}: no place {at} to resize")
            canvas[at : at + removed] = [None] * inserted
        found.append((step, list(canvas)))
    return found


def _put(canvas: Canvas, position: int, cell: Cell | None) -> None:
    if not 0 <= position < len(canvas):
        raise TraceError(f"position {position} is outside of {len(canvas)}")
    canvas[position] = cell


def _shown(token: int, text: str | None) -> str:
    return f"⟨{token}⟩" if text is None else text
