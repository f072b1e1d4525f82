"""Prometheus metrics of denoising, beside SGLang's own (docs/monitoring.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_dllm.config.refusals import Refusals
from sglang_dllm.decoding.canvas import Canvas

COUNTERS = {
    "num_forwards": ("sglang:dllm_forwards_total", "Denoising steps of ended requests"),
    "num_committed": ("sglang:dllm_committed_tokens_total", "Tokens they committed"),
    "tokens_computed": (
        "sglang:dllm_tokens_computed_total",
        "Canvas positions whose hidden states were computed, summed over forwards",
    ),
    "tokens_cached": (
        "sglang:dllm_tokens_cached_total",
        "Canvas positions of which cached keys and values were used instead",
    ),
    "full_refreshes": (
        "sglang:dllm_full_refreshes_total",
        "Forwards over a whole canvas, of requests with a cache",
    ),
}
"""The counter of each field of ``Canvas``: its name and its help text."""

WASTED = (
    "sglang:dllm_wasted_tokens_total",
    "Tokens that ended requests committed behind the EOS of their answer",
)
LAUNCHES = (
    "sglang:dllm_launches_total",
    "Forwards by how they were launched: step_graph, forward_graph or eager, and why "
    "they were eager",
)
"""The counter of launches: its name and its help text. It has SGLang's labels, and
``path`` and ``reason`` (``runtime.graphs.Captured``)."""

CANVAS_LEN = (
    "sglang:dllm_canvas_length_tokens",
    "Prompt and answer of ended requests, in tokens",
    (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
)
TPF = (
    "sglang:dllm_tokens_per_forward",
    "Committed tokens of an ended request divided by its forwards",
    (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32),
)
PHASES = (
    "sglang:dllm_phase_seconds",
    "Time of a step in the phases forward and decision, and of a round outside of "
    "its steps in the phase host",
    (
        *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        *(0.5, 1, 2, 5, 10),
    ),
)
"""Histograms: name, help text, upper bounds of the buckets."""

CANVASES = ("sglang:dllm_active_canvases", "Canvases that are being decoded")
QUEUED = ("sglang:dllm_queued_requests", "Requests that wait for admission")
CANVAS_TOKENS = (
    "sglang:dllm_active_canvas_tokens",
    "Tokens of their windows if each of them is full",
)
"""Gauges."""

_KINDS = ["algorithm", "cache"]
_REFUSED_FIELDS = (
    *("input_ids", "canvas", "custom_params", "max_new_tokens"),
    *("sampling_seed", "delimiter_ids"),
)


class Metrics:
    """Metrics with SGLang's labels. They count nothing where metrics are off.

    Attributes:
        is_on: whether anything is counted.
    """

    def __init__(self, collector: Any) -> None:
        """Register the metrics.

        Args:
            collector: the scheduler's. None without ``--enable-metrics``.
        """
        self.is_on = collector is not None
        self._refusals = Refusals(collector, _REFUSED_FIELDS)
        self._load = (0, 0, 0)
        if collector is None:
            return
        # Imported late: SGLang first sets where its processes share their counts.
        from prometheus_client import Counter, Gauge, Histogram

        labels = self._labels = dict(collector.labels)
        kinds = [*labels, *_KINDS]
        self._counters = {
            field: Counter(*texts, labelnames=kinds)
            for field, texts in COUNTERS.items()
        }
        self._wasted = Counter(*WASTED, labelnames=kinds)
        self._launches = Counter(*LAUNCHES, labelnames=[*labels, "path", "reason"])

        def histogram(texts: Any, names: list[str]) -> Histogram:
            name, text, bounds = texts
            return Histogram(name, text, labelnames=names, buckets=bounds)

        self._canvas_len = histogram(CANVAS_LEN, kinds)
        self._tpf = histogram(TPF, kinds)
        phases = histogram(PHASES, [*labels, "phase"])
        self._phases = {
            phase: phases.labels(**labels, phase=phase)
            for phase in ("forward", "decision", "host")
        }
        self._gauges = [
            # The only value of a process is its latest, and a dead one has none.
            Gauge(*texts, labelnames=list(labels), multiprocess_mode="mostrecent")
            for texts in (CANVASES, CANVAS_TOKENS, QUEUED)
        ]
        self._show(self._load)

    def launched(self, path: str, reason: str = "") -> None:
        """Count a forward.

        Args:
            reason: why it is eager; empty for a graph.
        """
        if self.is_on:
            self._launches.labels(**self._labels, path=path, reason=reason).inc()

    def took(self, phase: str, seconds: float) -> None:
        """Note the time of a phase: ``forward``, ``decision`` or ``host``."""
        if self.is_on:
            self._phases[phase].observe(seconds)

    def active(self, canvases: Sequence[Canvas], num_queued: int) -> None:
        """Show the load of a round. An idle scheduler asks often, so this is cheap."""
        if self.is_on:
            tokens = sum(canvas.num_windows * len(canvas) for canvas in canvases)
            load = (len(canvases), tokens, num_queued)
            if self._load != load:
                self._load = load
                self._show(load)

    def refused(self, error: Exception) -> None:
        """Count a request that admission refuses."""
        self._refusals.add("admission", error)

    def ended(self, canvas: Canvas) -> None:
        """Add the counts of a request that finished or was aborted."""
        if not self.is_on:
            return
        labels = {
            **self._labels,
            "algorithm": canvas.algorithm,
            "cache": canvas.cache,
        }
        for field, counter in self._counters.items():
            counter.labels(**labels).inc(getattr(canvas, field))
        self._wasted.labels(**labels).inc(num_wasted(canvas))
        self._canvas_len.labels(**labels).observe(len(canvas))
        if canvas.num_forwards:
            tpf = canvas.num_committed / canvas.num_forwards
            self._tpf.labels(**labels).observe(tpf)

    def _show(self, values: tuple[int, int, int]) -> None:
        for gauge, value in zip(self._gauges, values, strict=True):
            gauge.labels(**self._labels).set(value)


def num_wasted(canvas: Canvas) -> int:
    """Tokens that the algorithm committed behind the first EOS that ends the answer.

    It is 0 where no EOS ends the answer. Positions that a rule filled with EOS cost no
    forward of their own, and ``num_committed`` has none of them.
    """
    if canvas.ignore_eos:
        return 0
    start, end = canvas.answer_start, len(canvas) - canvas.num_padding
    committed = ~canvas.masked & ~canvas.fixed
    is_end = np.isin(canvas.ids, canvas.eos_ids) & committed
    is_end[: canvas.prompt_len + canvas.ends_from] = False
    (ends,) = is_end[:end].nonzero()
    if not len(ends):
        return 0
    kept = int(committed[start : ends[0] + 1].sum())
    return max(0, canvas.num_committed - kept)
