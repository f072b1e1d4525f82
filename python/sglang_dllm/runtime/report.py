"""The denoising report: fields of a response's meta_info."""

from __future__ import annotations

from typing import Any

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.resolved import Decoding

CHANNEL = "dllm_report"
"""Key under which reports travel in ``Req.customized_info``."""


class RequestReport:
    """Reads the counters of a canvas each time an output is sent."""

    def __init__(self, canvas: Canvas, decoding: Decoding) -> None:
        self.canvas = canvas
        self.decoding = decoding.to_dict()

    def as_customized_info(self) -> dict[str, Any]:
        """The form SGLang carries to ``meta_info``."""
        return {CHANNEL: _OncePerOutput(self)}

    def to_dict(self) -> dict[str, Any]:
        canvas = self.canvas
        return {
            "dllm": self.decoding,
            "max_forwards_reached": canvas.cut_short,
            "num_forwards": canvas.num_forwards,
            "num_committed_tokens": canvas.num_committed,
            "canvas_len": len(canvas),
            "tokens_computed": canvas.tokens_computed,
            "tokens_cached": canvas.tokens_cached,
            "full_refreshes": canvas.full_refreshes,
        }


class _OncePerOutput:
    """Stands in for SGLang's list of one value per token.

    SGLang slices the list by the tokens of each output that it sends, and once more
    where a stream has only what is new. This one answers a slice with one report for
    each token, all the same, and with one for an output without a token.
    """

    def __init__(self, report: RequestReport) -> None:
        self.report = report

    def __getitem__(self, span: slice) -> list[dict[str, Any]]:
        return [self.report.to_dict()] * max(1, span.stop - span.start)


def into_meta_info(meta_info: dict[str, Any]) -> None:
    """Turn the reports of a response into plain fields, in place.

    The last report counts. ``tokens_per_forward`` (TPF) is the number of visible
    tokens divided by the number of forwards.
    """
    reports = meta_info.pop(CHANNEL, None)
    if not reports:
        return
    meta_info.update(reports[-1])
    forwards = meta_info["num_forwards"]
    tokens = meta_info.get("completion_tokens", 0)
    meta_info["tokens_per_forward"] = tokens / forwards if forwards else 0.0
