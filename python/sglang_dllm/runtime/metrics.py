"""Prometheus counters of denoising, beside SGLang's own metrics."""

from __future__ import annotations

from typing import Any

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


LAUNCHES = (
    "sglang:dllm_launches_total",
    "Forwards by how they were launched: step_graph, forward_graph or eager, and why "
    "they were eager",
)
"""The counter of launches: its name and its help text. It has SGLang's labels, and
``path`` and ``reason`` (``runtime.graphs.Captured``)."""


class Metrics:
    """Counters with SGLang's labels. They count nothing where metrics are off."""

    def __init__(self, collector: Any) -> None:
        """Register the counters.

        Args:
            collector: the scheduler's. None without ``--enable-metrics``.
        """
        self._counters = {}
        self._launches: Any = None
        if collector is None:
            return
        # Imported late: SGLang first sets where its processes share their counts.
        from prometheus_client import Counter

        for field, (name, text) in COUNTERS.items():
            counter = Counter(name, text, labelnames=list(collector.labels))
            self._counters[field] = counter.labels(**collector.labels)

        self._labels = collector.labels
        names = [*collector.labels, "path", "reason"]
        self._launches = Counter(*LAUNCHES, labelnames=names)

    def launched(self, path: str, reason: str = "") -> None:
        """Count a forward.

        Args:
            reason: why it is eager; empty for a graph.
        """
        if self._launches is not None:
            self._launches.labels(**self._labels, path=path, reason=reason).inc()

    def ended(self, canvas: Canvas) -> None:
        """Add the counts of a request that finished or was aborted."""
        for field, counter in self._counters.items():
            counter.inc(getattr(canvas, field))
