"""The denoising report: fields of a response's meta_info."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_dllm.config.resolve import SCORE_KEY
from sglang_dllm.config.scoring import Scoring
from sglang_dllm.config.watching import Watching
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.history import ranges
from sglang_dllm.decoding.resolved import Decoding

CHANNEL = "dllm_report"
"""Key under which reports travel in ``Req.customized_info``."""

_NEWS = "news"
"""Key of the last report of an output of a watched canvas: its new steps."""

_GAPS = "final_gaps"
"""Key of the last report of an output of a streamed canvas with several gaps."""

Gap = tuple[int, int]
"""A run of masks, as a half-open range of answer positions."""


class RequestReport:
    """Reads the counters of a canvas each time an output is sent."""

    def __init__(
        self,
        canvas: Canvas,
        decoding: Decoding,
        watching: Watching | None = None,
        streamed_gaps: Sequence[Gap] = (),
        scoring: Scoring | None = None,
    ) -> None:
        """
        Args:
            canvas: with nothing decoded.
            streamed_gaps: of which a stream tells as soon as each is final.
            scoring: of a scored canvas.
        """
        self.canvas = canvas
        self.decoding = decoding.to_dict()
        if scoring is not None:
            self.decoding = {SCORE_KEY: scoring.to_dict()}
        watching = watching or Watching()
        self._watching = watching.to_dict()
        self._is_drafted = watching.stream is not None
        self._gaps, self._num_final = streamed_gaps, 0
        self._start = {
            "prompt_len": canvas.answer_start,
            "answer_len": len(canvas) - canvas.answer_start,
            "pinned": _pinned(canvas),
        }

    def as_customized_info(self) -> dict[str, Any]:
        """The form SGLang carries to ``meta_info``."""
        return {CHANNEL: _OncePerOutput(self)}

    def to_dict(self) -> dict[str, Any]:
        canvas, score = self.canvas, {}
        if canvas.scored is not None and canvas.done:
            score = {SCORE_KEY: canvas.scored.to_dict()}
        return {
            **score,
            "dllm": self.decoding,
            "max_forwards_reached": canvas.cut_short,
            "num_forwards": canvas.num_forwards,
            "num_committed_tokens": canvas.num_committed,
            "canvas_len": len(canvas),
            "tokens_computed": canvas.tokens_computed,
            "tokens_cached": canvas.tokens_cached,
            "full_refreshes": canvas.full_refreshes,
        }

    @property
    def has_news(self) -> bool:
        """True if a stream has something to send, with or without a token."""
        history = self.canvas.history
        if self._is_drafted and history is not None and history.has_news:
            return True
        return len(self._final_gaps()) > self._num_final

    def take_gaps(self) -> list[list[Any]]:
        """The index and the token ids of each gap that is final."""
        found = self._final_gaps()
        self._num_final = len(found)
        return found

    def _final_gaps(self) -> list[list[Any]]:
        canvas, found = self.canvas, []
        for index, (start, end) in enumerate(self._gaps):
            places = slice(canvas.answer_start + start, canvas.answer_start + end)
            if not canvas.masked[places].any():
                found.append([index, canvas.ids[places].tolist()])
        return found

    def take_news(self) -> dict[str, Any] | None:
        """The steps that no output has had yet. None if nobody watches the canvas.

        ``first`` is the index of the first of them in the history, and ``start`` says
        how the canvas was before any step.
        """
        canvas = self.canvas
        if canvas.history is None:
            return None
        first, steps = canvas.history.take_news()
        return {
            **self._watching,
            "start": self._start,
            "first": first,
            "steps": steps,
            "masked": ranges(canvas.masked[canvas.answer_start :]),
            "answer_len": len(canvas) - canvas.answer_start,
        }


def _pinned(canvas: Canvas) -> list[list[int]]:
    """``[position, token]`` of the answer's text that the request gave."""
    start = canvas.answer_start
    (found,) = canvas.fixed[start:].nonzero()
    return [[int(at), int(canvas.ids[start + at])] for at in found]


class _OncePerOutput:
    """Stands in for SGLang's list of one value per token.

    SGLang slices the list by the tokens of each output that it sends, and once more
    where a stream has only what is new. This one answers a slice with one report for
    each token, all the same, and with one for an output without a token. The last one
    has the news of a watched canvas and the final gaps too.
    """

    def __init__(self, report: RequestReport) -> None:
        self.report = report

    def __getitem__(self, span: slice) -> list[dict[str, Any]]:
        reports = [self.report.to_dict()] * max(1, span.stop - span.start)
        news, gaps = self.report.take_news(), self.report.take_gaps()
        if news is not None:
            reports[-1] = {**reports[-1], _NEWS: news}
        if gaps:
            reports[-1] = {**reports[-1], _GAPS: gaps}
        return reports


def final_gaps(meta_info: Mapping[str, Any]) -> list[list[Any]]:
    """The gaps of a streamed canvas that are final: index and token ids of each.

    Gaps that an earlier part of the stream had are among them.
    """
    reports = meta_info.get(CHANNEL) or [{}]
    found: list[list[Any]] = (reports[-1] or {}).get(_GAPS, [])
    return found


def into_meta_info(meta_info: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn the reports of a response into plain fields, in place.

    The last report counts. ``tokens_per_forward`` (TPF) is the number of visible
    tokens divided by the number of forwards.

    Returns:
        The news of a watched canvas, the last one of the latest output. A part of a
        stream may repeat what an earlier part had.
    """
    reports = meta_info.pop(CHANNEL, None)
    if not reports:
        return []
    news = []
    if _NEWS in reports[-1]:
        news = [report[_NEWS] for report in reports if report and _NEWS in report]
    meta_info.update(reports[-1])
    for key in (_NEWS, _GAPS):
        meta_info.pop(key, None)
    forwards = meta_info["num_forwards"]
    tokens = meta_info.get("completion_tokens", 0)
    meta_info["tokens_per_forward"] = tokens / forwards if forwards else 0.0
    return news
