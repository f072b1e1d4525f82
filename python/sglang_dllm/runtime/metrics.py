"""What ``/metrics`` says of denoising, beside SGLang's own figures."""

from __future__ import annotations

from typing import Any

from sglang_dllm.decoding.canvas import Canvas

COUNTERS = {
    "num_forwards": ("sglang:dllm_forwards_total", "Denoising steps of ended requests"),
    "num_committed": ("sglang:dllm_committed_tokens_total", "Tokens they committed"),
    "tokens_computed": (
        "sglang:dllm_rows_computed_total",
        "Canvas positions whose hidden states were computed, summed over forwards",
    ),
    "tokens_cached": (
        "sglang:dllm_rows_reused_total",
        "Canvas positions of which cached keys and values were used instead",
    ),
    "full_refreshes": (
        "sglang:dllm_full_refreshes_total",
        "Forwards over a whole canvas, of requests with a cache",
    ),
}
"""Field of ``Canvas``: the counter's name and what it counts."""


class Metrics:
    """Prometheus counters with SGLang's labels; nothing where metrics are off."""

    def __init__(self, collector: Any) -> None:
        """``collector``: the scheduler's, None without ``--enable-metrics``."""
        self._counters = {}
        if collector is None:
            return
        # After SGLang has said where processes share their figures.
        from prometheus_client import Counter

        for field, (name, text) in COUNTERS.items():
            counter = Counter(name, text, labelnames=list(collector.labels))
            self._counters[field] = counter.labels(**collector.labels)

    def ended(self, canvas: Canvas) -> None:
        """Count what a request did, finished or aborted."""
        for field, counter in self._counters.items():
            counter.inc(getattr(canvas, field))
