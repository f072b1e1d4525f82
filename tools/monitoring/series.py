"""The curves of a board: PromQL for Grafana, and numbers of recorded scrapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Labels: TypeAlias = tuple[str, ...]
Curves: TypeAlias = dict[str, list[tuple[float, float]]]
"""Points of seconds and value, by the curve's name."""

MODEL = '{model_name=~"$model"}'
"""The board shows the models that a person chooses."""

_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Scrape:
    """An answer of /metrics.

    Attributes:
        seconds: since the first one.
        samples: name, labels and value.
    """

    seconds: float
    samples: Sequence[tuple[str, Mapping[str, str], float]]

    @classmethod
    def of(cls, seconds: float, lines: Sequence[str]) -> Scrape:
        found = filter(None, map(_SAMPLE.match, lines))
        return cls(
            seconds,
            [(x[1], dict(_LABEL.findall(x[2] or "")), float(x[3])) for x in found],
        )

    def sums(self, name: str, by: Labels) -> dict[Labels, float]:
        """The sum of a metric's series for each value of some labels."""
        total: dict[Labels, float] = defaultdict(float)
        for sample, labels, value in self.samples:
            if sample == name:
                total[tuple(labels.get(label, "") for label in by)] += value
        return total


def _rates(
    scrapes: Sequence[Scrape], name: str, by: Labels, reach: int
) -> Iterator[tuple[float, dict[Labels, float]]]:
    """Growth a second between scrapes that lie ``reach`` apart."""
    for first, last in zip(scrapes, scrapes[reach:], strict=False):
        before, after = first.sums(name, by), last.sums(name, by)
        time = last.seconds - first.seconds
        yield (
            last.seconds,
            {key: (after[key] - before.get(key, 0)) / time for key in after},
        )


class Series(Protocol):
    """One query of a panel."""

    by: Labels

    def promql(self) -> str: ...

    def curves(self, scrapes: Sequence[Scrape], reach: int) -> Curves:
        """
        Args:
            reach: scrapes over which a rate is taken.
        """
        ...


@dataclass(frozen=True)
class Level:
    """The value of a gauge, summed over its series."""

    metric: str
    by: Labels = ()
    name: str = ""

    def promql(self) -> str:
        return f"sum{_by(self.by)} ({self.metric}{MODEL})"

    def curves(self, scrapes: Sequence[Scrape], reach: int) -> Curves:
        points = ((s.seconds, s.sums(self.metric, self.by)) for s in scrapes)
        return _curves(points, self.name)


@dataclass(frozen=True)
class Rate:
    """The growth of a counter a second."""

    metric: str
    by: Labels = ()
    name: str = ""

    def promql(self) -> str:
        return f"sum{_by(self.by)} (rate({self.metric}{MODEL}[$__rate_interval]))"

    def curves(self, scrapes: Sequence[Scrape], reach: int) -> Curves:
        return _curves(_rates(scrapes, self.metric, self.by, reach), self.name)


@dataclass(frozen=True)
class Ratio:
    """The growth of a counter for each unit of the growth of others."""

    metric: str
    below: Labels
    by: Labels = ()
    name: str = ""

    def promql(self) -> str:
        below = " + ".join(Rate(one, self.by).promql() for one in self.below)
        return f"{Rate(self.metric, self.by).promql()} / ({below})"

    def curves(self, scrapes: Sequence[Scrape], reach: int) -> Curves:
        def points() -> Iterator[tuple[float, dict[Labels, float]]]:
            names = (self.metric, *self.below)
            rates = [_rates(scrapes, name, self.by, reach) for name in names]
            for (seconds, above), *others in zip(*rates, strict=True):
                below = {
                    key: sum(other.get(key, 0) for _, other in others) for key in above
                }
                yield seconds, {k: above[k] / below[k] for k in above if below[k]}

        return _curves(points(), self.name)


@dataclass(frozen=True)
class Quantile:
    """A quantile of a histogram's new values."""

    quantile: float
    metric: str
    by: Labels = ()
    name: str = ""

    def promql(self) -> str:
        rate = Rate(f"{self.metric}_bucket", ("le", *self.by)).promql()
        return f"histogram_quantile({self.quantile}, {rate})"

    def curves(self, scrapes: Sequence[Scrape], reach: int) -> Curves:
        def points() -> Iterator[tuple[float, dict[Labels, float]]]:
            name, by = f"{self.metric}_bucket", ("le", *self.by)
            for seconds, rates in _rates(scrapes, name, by, reach):
                buckets: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
                for (bound, *rest), rate in rates.items():
                    buckets[tuple(rest)].append((float(bound), rate))
                yield (
                    seconds,
                    {
                        key: quantile(sorted(found), self.quantile)
                        for key, found in buckets.items()
                        if max(rate for _, rate in found) > 0
                    },
                )

        name = f"p{round(self.quantile * 100)} {self.name}".strip()
        return _curves(points(), name)


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Prometheus's estimate: linear in the bucket that the quantile lies in.

    Args:
        buckets: upper bound and cumulated count, the last bound infinite.
    """
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            if bound == float("inf"):
                return low
            inside = count - below
            return low + (bound - low) * ((wanted - below) / inside if inside else 1)
        low, below = bound, count
    return low


def legend(series: Any) -> str:
    """Grafana's name of a curve."""
    name = series.name
    if isinstance(series, Quantile):
        name = f"p{round(series.quantile * 100)} {name}".strip()
    return " ".join([name, *(f"{{{{{label}}}}}" for label in series.by)]).strip()


def _by(labels: Labels) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _curves(points: Iterator[tuple[float, dict[Labels, float]]], name: str) -> Curves:
    found: Curves = defaultdict(list)
    for seconds, values in points:
        for key, value in values.items():
            found[" ".join([name, *key]).strip()].append((seconds, value))
    return dict(found)
