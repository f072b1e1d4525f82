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


class Metrics:
    """Counters with SGLang's labels. They count nothing where metrics are off."""

    def __init__(self, collector: Any) -> None:
        """Register the counters.

        Args:
            collector: the scheduler's. None without ``--enable-metrics``.
        """
        self._counters = {}
        if collector is None:
            return
        # Imported late: SGLang first sets where its processes share their counts.
        from prometheus_client import Counter

        for field, (name, text) in COUNTERS.items():
            counter = Counter(name, text, labelnames=list(collector.labels))
            self._counters[field] = counter.labels(**collector.labels)

    def ended(self, canvas: Canvas) -> None:
        """Add the counts of a request that finished or was aborted."""
        for field, counter in self._counters.items():
            counter.inc(getattr(canvas, field))
