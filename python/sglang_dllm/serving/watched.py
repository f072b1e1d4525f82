"""Clients get the history of a watched canvas: step by step, and as a whole trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import orjson
from pydantic import BaseModel, create_model

from sglang_dllm.decoding.history import FORMAT, VERSION

EXTENSION = ContextVar[dict[str, Any] | None]("EXTENSION", default=None)
"""The extension object of the answer that the tokenizer manager gave last in this task.
The OpenAI streams make their next chunk of that answer."""


class WatchedAnswers:
    """The histories of the answers of one request, by the ids of SGLang."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: None where the server has none; tokens then have no text.
        """
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}
        self._steps: dict[str, list[dict[str, Any]]] = {}

    def add(self, meta_info: dict[str, Any], news: Sequence[Mapping[str, Any]]) -> None:
        """Put what is new into ``meta_info["dllm"]``, and the trace at the end.

        Args:
            meta_info: of an answer, or of a part of a stream; changed in place.
            news: as ``runtime.report.into_meta_info`` returns it.
        """
        if not news:
            return
        steps = self._steps.setdefault(meta_info["id"], [])
        num_known, last = len(steps), news[-1]
        for one in news:
            # A part of a stream may repeat the news of earlier ones.
            steps += map(self._step, one["steps"][max(0, len(steps) - one["first"]) :])
        more: dict[str, Any] = {}
        if last.get("stream"):
            more["draft"] = {
                "steps": steps[num_known:],
                "masked": last["masked"],
                "answer_len": last["answer_len"],
            }
            if not num_known:
                more["draft"]["start"] = self._start(last)
        if last.get("trace") and meta_info["finish_reason"] is not None:
            more["trace"] = {
                "format": FORMAT,
                "version": VERSION,
                "dllm": meta_info["dllm"],
                **self._start(last),
                "steps": steps,
            }
        meta_info["dllm"] = {**meta_info["dllm"], **more}

    def _start(self, news: Mapping[str, Any]) -> dict[str, Any]:
        start = dict(news["start"])
        pinned = [[at, token, self._text(token)] for at, token in start.pop("pinned")]
        return {**start, "pinned": pinned}

    def _step(self, step: Mapping[str, Any]) -> dict[str, Any]:
        committed = [
            [position, token, self._text(token), _confidence(logprob)]
            for position, token, logprob in step["committed"]
        ]
        found: dict[str, Any] = {"forward": step["forward"], "committed": committed}
        return found | {
            key: step[key] for key in ("taken_back", "resized") if step[key]
        }

    def _text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def _confidence(logprob: float) -> float | None:
    """A probability; None where no forward measured it."""
    return None if math.isnan(logprob) else round(math.exp(logprob), 6)


def extension_of(meta_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object ``dllm`` that an answer of an OpenAI route has beside ``choices``."""
    found = meta_info.get("dllm") or {}
    return {k: found[k] for k in ("draft", "trace", "gaps") if found.get(k)} or None


def with_extension(chunk: str | bytes, extension: Mapping[str, Any]) -> str:
    """An event of an OpenAI stream with the extension object."""
    text = chunk if isinstance(chunk, str) else chunk.decode()
    body = orjson.loads(text.removeprefix("data: "))
    return f"data: {orjson.dumps({**body, 'dllm': extension}).decode()}\n\n"


def extended(answer: Any, answers: Sequence[Mapping[str, Any]]) -> Any:
    """An answer of an OpenAI route with the traces and the gaps of its choices.

    Args:
        answer: SGLang's model of it.
        answers: of the tokenizer manager, one for each choice.

    Returns:
        The answer as it is, unless a choice has one of them. With several choices each
        is a list of one for each choice.
    """
    found = [extension_of(one["meta_info"]) or {} for one in answers]
    extension = {
        key: found[0].get(key) if len(found) == 1 else [one.get(key) for one in found]
        for key in ("trace", "gaps")
        if any(key in one for one in found)
    }
    if not extension or not isinstance(answer, BaseModel):
        return answer
    kind = create_model(
        type(answer).__name__, __base__=type(answer), dllm=(dict[str, Any], ...)
    )
    fields = {name: getattr(answer, name) for name in type(answer).model_fields}
    return kind.model_construct(**fields, dllm=extension)
