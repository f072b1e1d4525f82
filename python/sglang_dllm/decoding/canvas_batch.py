"""The canvases that one algorithm decodes, as rows of tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self, TypeAlias

import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.models.facts import ModelFacts

Device: TypeAlias = torch.device | str
Widths: TypeAlias = dict[str, torch.Size]
"""Of a tensor's name, its sizes but the number of canvases."""


@dataclass(frozen=True)
class Step:
    """What the next forward of every canvas decides; R canvases, answers up to A.

    Attributes:
        candidates: ``(R, A)`` bool: the positions that are judged.
        start, end: ``(R,)`` int64: the span that is being decoded, half-open, from
            the answer's start. It holds all candidates; a cache recomputes it.
        quota: ``(R,)`` int64: how many of the best candidates to accept or to
            consider; None for all of them.
        forced_start, forced_end: ``(R,)`` int64: the range in which at least one
            candidate must be accepted; empty where nothing is forced.
        share: ``(R,)`` float64: the probability with which each candidate is
            accepted, for schedules of independent positions.
    """

    candidates: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    quota: torch.Tensor | None = None
    forced_start: torch.Tensor | None = None
    forced_end: torch.Tensor | None = None
    share: torch.Tensor | None = None


@dataclass
class CanvasBatch:
    """R canvases whose answers are at most A tokens long; positions count from the
    answer's start, and all tensors have one row a canvas.

    Attributes:
        records: the canvases as the host knows them, in order.
        options: of each.
        ids: ``(R, A)`` int64; the mask token where ``masked``.
        masked: ``(R, A)`` bool: not committed; False behind a shorter answer.
        prompt_len, answer_len: ``(R,)`` int64.
        num_forwards, num_committed: ``(R,)`` int64, as ``Canvas`` has them.
        cut_short, done: ``(R,)`` bool, likewise.
        state: the algorithm's own tensors, ``(R, ...)``.
        cache: the cache strategies' tensors, ``(R, ...)``.
        step: of the next forward.

    A tensor is as wide as its widest canvas needs. ``_widths`` has for each canvas what
    it needs, by the tensor's name: when a wide one leaves, the rest gets narrow again.
    """

    facts: ModelFacts
    records: list[Canvas]
    options: list[Any]
    ids: torch.Tensor
    masked: torch.Tensor
    prompt_len: torch.Tensor
    answer_len: torch.Tensor
    num_forwards: torch.Tensor
    num_committed: torch.Tensor
    cut_short: torch.Tensor
    done: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    cache: dict[str, torch.Tensor] = field(default_factory=dict)
    step: Step | None = None
    _once: dict[Any, Any] = field(default_factory=dict)
    _widths: list[Widths] = field(default_factory=list)

    @classmethod
    def of(
        cls, canvas: Canvas, options: Any, facts: ModelFacts, device: Device
    ) -> Self:
        """One canvas with nothing decoded."""

        def one(value: int) -> torch.Tensor:
            # Filled, not uploaded, which would wait for a forward that runs.
            return torch.full((1,), value, device=device)

        length = canvas.answer_len
        nothing = torch.zeros(1, dtype=torch.bool, device=device)
        return cls(
            facts,
            [canvas],
            [options],
            ids=torch.full((1, length), facts.mask_id, device=device),
            masked=torch.ones((1, length), dtype=torch.bool, device=device),
            prompt_len=one(canvas.prompt_len),
            answer_len=one(length),
            num_forwards=one(0),
            num_committed=one(0),
            cut_short=nothing,
            done=nothing.clone(),
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def max_answer_len(self) -> int:
        """A."""
        return self.ids.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """``(A,)`` int64: 0 to A - 1."""
        return indices(self.max_answer_len, self.device)

    @property
    def inside(self) -> torch.Tensor:
        """``(R, A)`` bool: whether a position is one of the answer's."""
        inside: torch.Tensor = self.once(
            "inside", lambda: self.positions < self.answer_len[:, None]
        )
        return inside

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What depends on nothing but which canvases these are, made once."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def constant(
        self, key: Any, make: Callable[[], Sequence[Any]], dtype: torch.dtype
    ) -> torch.Tensor:
        """``(R, ...)``: values of each canvas, uploaded once."""

        def upload() -> torch.Tensor:
            values = torch.tensor(make(), dtype=dtype)
            return values.to(self.device, non_blocking=True)

        uploaded: torch.Tensor = self.once((key, dtype), upload)
        return uploaded

    def option(
        self, name: str, dtype: torch.dtype = torch.float64, missing: Any = 0
    ) -> torch.Tensor:
        """``(R,)``: each canvas's value of an option, ``missing`` for None."""

        def values() -> list[Any]:
            found = [getattr(options, name) for options in self.options]
            return [missing if value is None else value for value in found]

        return self.constant((name, missing), values, dtype)

    def option_is(self, name: str, value: Any) -> torch.Tensor:
        """``(R,)`` bool: whether each canvas's option has a value."""
        return self.constant(
            (name, "is", value),
            lambda: [getattr(options, name) == value for options in self.options],
            torch.bool,
        )

    def sampling(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """``(R,)``: a field of each canvas's ``SamplingOptions``."""
        return self.constant(
            ("sampling", name),
            lambda: [getattr(canvas.sampling, name) for canvas in self.records],
            dtype,
        )

    def flag(self, name: str) -> torch.Tensor:
        """``(R,)`` bool: a field of each ``Canvas`` that never changes."""
        return self.constant(
            ("canvas", name),
            lambda: [getattr(canvas, name) for canvas in self.records],
            torch.bool,
        )

    def is_last_forward(self) -> torch.Tensor | None:
        """``(R,)`` bool: whether ``max_forwards`` ends a canvas with the next one;
        None where it ends no canvas at all."""
        if all(options.max_forwards is None for options in self.options):
            return None
        most = self.option("max_forwards", torch.int64, missing=1 << 62)
        return self.num_forwards + 1 >= most

    def first_masked(self) -> torch.Tensor:
        """``(R,)`` int64: the first position not committed, A where there is none."""
        return first_true(self.masked)

    def first_eos(self) -> torch.Tensor:
        """``(R,)`` int64: the first committed EOS, A where there is none."""
        found = torch.zeros_like(self.inside)
        for eos in self.facts.eos_ids:
            found |= self.ids == eos
        # What is masked holds the mask token, which ends nothing.
        return first_true(found & self.inside)

    def update_done(self) -> None:
        """Find out which canvases need no forward any more."""
        first_masked = self.first_masked()
        self.done = first_masked == self.max_answer_len
        if any(canvas.ends_at_eos for canvas in self.records):
            ended = self.first_eos() < first_masked
            self.done |= ended & self.flag("ends_at_eos")

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the canvases, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        all_widths = self.widths()
        widths = [all_widths[row] for row in rows]

        def chosen(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
            needed = [one[name] for one in widths if name in one]
            if len(needed) < len(widths):  # not there from the start
                return tensors[0][index]
            widest = (slice(max(sizes)) for sizes in zip(*needed, strict=True))
            return tensors[0][(index, *widest)]

        return self._with(
            [self.records[row] for row in rows],
            [self.options[row] for row in rows],
            widths,
            chosen,
            [self],
        )

    def joined(self, other: Self) -> Self:
        """These canvases, then the others; shorter answers are padded."""
        return self._with(
            self.records + other.records,
            self.options + other.options,
            self.widths() + other.widths(),
            _stacked,
            [self, other],
        )

    def widths(self) -> list[Widths]:
        """What each canvas needs; of one that is alone, what it has."""
        if not self._widths:
            assert len(self) == 1
            self._widths = [{name: t.shape[1:] for name, t in self._tensors().items()}]
        return self._widths

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name, those of ``state``, ``cache`` and ``step`` too."""
        found = dict(vars(self))
        for name in ("state", "cache"):
            found |= {f"{name}.{key}": t for key, t in getattr(self, name).items()}
        if self.step is not None:
            found |= {f"step.{key}": t for key, t in vars(self.step).items()}
        return {k: t for k, t in found.items() if isinstance(t, torch.Tensor)}

    def _with(
        self,
        records: list[Canvas],
        options: list[Any],
        widths: list[Widths],
        merge: Callable[[str, list[torch.Tensor]], torch.Tensor],
        parts: list[Self],
    ) -> Self:
        """CanvasBatch whose every tensor is merged from the parts' ones of its name."""
        tensors = [part._tensors() for part in parts]
        merged = {name: merge(name, [t[name] for t in tensors]) for name in tensors[0]}

        def of(group: str) -> dict[str, torch.Tensor]:
            pairs = ((name.partition("."), tensor) for name, tensor in merged.items())
            return {key: tensor for (first, _, key), tensor in pairs if first == group}

        return type(self)(
            self.facts,
            records,
            options,
            **{name: tensor for name, tensor in merged.items() if "." not in name},
            state=of("state"),
            cache=of("cache"),
            step=Step(**of("step")) if self.step is not None else None,
            _widths=widths,
        )


def first_true(values: torch.Tensor) -> torch.Tensor:
    """``(R,)`` int64: the first True in each row of ``(R, A)``, A if there is none."""
    length = values.shape[1]
    if length == 0:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)
    index = indices(length, values.device)
    return torch.where(values, index, number(length, values.device)).amin(dim=1)


@lru_cache(maxsize=4096, typed=True)
def number(value: float, device: torch.device) -> torch.Tensor:
    """``()`` int64, or float64 for a float; not to be written to. A literal would be
    made into a tensor each time."""
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def indices(length: int, device: torch.device) -> torch.Tensor:
    """``(length,)`` int64 from 0; not to be written to."""
    return _power_of_two(length.bit_length(), device)[:length]


@lru_cache(maxsize=64)
def _power_of_two(exponent: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1 << exponent, device=device)


def _stacked(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows on rows; shorter trailing dimensions are filled up with zeros."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    widest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    return torch.cat(
        [
            part
            if list(part.shape[1:]) == widest
            else torch.nn.functional.pad(
                part,
                [
                    pad
                    for size, most in zip(
                        reversed(part.shape[1:]), reversed(widest), strict=True
                    )
                    for pad in (0, most - size)
                ],
            )
            for part in parts
        ]
    )
