"""The Prometheus counter of refused requests, in whichever process refuses them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sglang_dllm.errors import ConfigError, RequestError

REFUSALS = (
    "sglang:dllm_refusals_total",
    "Refused requests, by the stage and the field that refused them",
)
"""Its name and its help text. It has SGLang's labels, and ``stage`` and ``field``."""

_PATH = re.compile(r"[\w.\[\]]+")


class Refusals:
    """Counts refused requests. Counts nothing where metrics are off."""

    def __init__(self, collector: Any, fields: Collection[str]) -> None:
        """
        Args:
            collector: SGLang's, of this process. None without ``--enable-metrics``.
            fields: names that the label ``field`` may have. A client chooses the other
                names, so all of those share ``other``: labels must stay few.
        """
        self._labels = None if collector is None else dict(collector.labels)
        self._fields = frozenset(fields)

    def add(self, stage: str, error: Exception | None = None) -> None:
        """Count a refusal whose message begins with the field or the path to it.

        Args:
            error: None where no field is wrong.
        """
        if self._labels is None:
            return
        path = None if error is None else _PATH.match(str(error))
        parts = re.findall(r"[A-Za-z_]+", path[0]) if path else []
        field = next((x for x in reversed(parts) if x in self._fields), "other")
        counter = _counter(tuple(self._labels))
        counter.labels(**self._labels, stage=stage, field=field).inc()

    @contextmanager
    def counted(self, stage: str) -> Iterator[None]:
        """Count a refusal that the block raises."""
        try:
            yield
        except (RequestError, ConfigError) as error:
            self.add(stage, error)
            raise


@cache
def _counter(names: tuple[str, ...]) -> Any:
    """One counter a process, which may have several engines one behind the other."""
    # Imported late: SGLang first sets where its processes share their counts.
    from prometheus_client import Counter

    return Counter(*REFUSALS, labelnames=[*names, "stage", "field"])
