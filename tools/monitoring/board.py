"""The panels of the Grafana board. ``python -m tools.monitoring.board`` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.monitoring.series import Level, Quantile, Rate, Ratio, Series, legend

FILE = (
    Path(__file__).parents[2] / "deploy/monitoring/grafana/dashboards/sglang_dllm.json"
)
_KIND = ("algorithm", "cache")


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        unit: Grafana's name of it.
        about: the text behind the panel's ``i``.
    """

    title: str
    unit: str
    about: str
    series: Sequence[Series]


PANELS = (
    Panel(
        "Canvases and queue",
        "short",
        "Canvases that are being decoded, and requests that wait for admission.",
        (
            Level("sglang:dllm_active_canvases", name="active"),
            Level("sglang:dllm_queued_requests", name="queued"),
        ),
    ),
    Panel(
        "Tokens in active canvases",
        "short",
        "The tokens of a forward if every window is full: the true load.",
        (Level("sglang:dllm_active_canvas_tokens", name="tokens"),),
    ),
    Panel(
        "Wait for admission",
        "s",
        "Time in the queue of the scheduler.",
        (
            Quantile(0.5, "sglang:queue_time_seconds"),
            Quantile(0.95, "sglang:queue_time_seconds"),
        ),
    ),
    Panel(
        "Committed tokens",
        "cps",
        "Tokens a second, counted when a request ends.",
        (Rate("sglang:dllm_committed_tokens_total", _KIND),),
    ),
    Panel(
        "Tokens per forward",
        "short",
        "Committed tokens divided by forwards. An autoregressive model has 1.",
        (
            Ratio(
                "sglang:dllm_committed_tokens_total",
                ("sglang:dllm_forwards_total",),
                _KIND,
            ),
        ),
    ),
    Panel(
        "Launches",
        "cps",
        "Forwards a second: whole steps in a graph, forwards in a graph, or eager.",
        (Rate("sglang:dllm_launches_total", ("path", "reason")),),
    ),
    Panel(
        "Time of a phase",
        "s",
        "Forward and decision of a step, and the host's work between two rounds.",
        (Quantile(0.95, "sglang:dllm_phase_seconds", ("phase",)),),
    ),
    Panel(
        "Share of time",
        "percentunit",
        "Seconds of each phase in a second.",
        (Rate("sglang:dllm_phase_seconds_sum", ("phase",)),),
    ),
    Panel(
        "Window share",
        "percentunit",
        "Positions that forwards computed, of all positions. Without a cache it is 1.",
        (
            Ratio(
                "sglang:dllm_tokens_computed_total",
                (
                    "sglang:dllm_tokens_computed_total",
                    "sglang:dllm_tokens_cached_total",
                ),
                _KIND,
            ),
        ),
    ),
    Panel(
        "Refreshes",
        "cps",
        "Forwards over whole canvases, of requests with a cache.",
        (Rate("sglang:dllm_full_refreshes_total", _KIND),),
    ),
    Panel(
        "Wasted tokens",
        "percentunit",
        "Tokens behind the EOS of their answer, of all that were committed.",
        (
            Ratio(
                "sglang:dllm_wasted_tokens_total",
                ("sglang:dllm_committed_tokens_total",),
                _KIND,
            ),
        ),
    ),
    Panel(
        "Length of canvases",
        "short",
        "Prompt and answer of ended requests, in tokens.",
        (
            Quantile(0.5, "sglang:dllm_canvas_length_tokens"),
            Quantile(0.95, "sglang:dllm_canvas_length_tokens"),
        ),
    ),
    Panel(
        "Refusals",
        "cps",
        "Refused requests, by the stage and the field that refused them.",
        (Rate("sglang:dllm_refusals_total", ("stage", "field")),),
    ),
)


def board() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.about,
            "datasource": source,
            "gridPos": {"x": number % 3 * 8, "y": number // 3 * 7, "w": 8, "h": 7},
            "fieldConfig": {
                "defaults": {"unit": panel.unit, "min": 0},
                "overrides": [],
            },
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "expr": series.promql(),
                    "legendFormat": legend(series),
                    "datasource": source,
                }
                for index, series in enumerate(panel.series)
            ],
        }
        for number, panel in enumerate(PANELS)
    ]
    model = {
        "name": "model",
        "type": "query",
        "datasource": source,
        "query": "label_values(sglang:dllm_active_canvases, model_name)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "sglang-dllm",
        "title": "sglang-dllm",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                model,
            ]
        },
        "panels": panels,
    }


def text() -> str:
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
