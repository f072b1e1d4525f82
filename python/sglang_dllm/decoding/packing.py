"""How the canvases of a step are packed into one forward, ragged and unpadded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import numpy as np
import torch

from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.decoding.canvas_batch import CanvasBatch


@dataclass(frozen=True)
class Row:
    """One row of the forward: a canvas's window, of its own ids or the unconditional
    ones (its prompt masked, for guidance)."""

    canvas: Canvas
    is_unconditional: bool = False

    @property
    def length(self) -> int:
        start, end = self.canvas.window
        return end - start


@dataclass
class Candidates:
    """What one group of R canvases decides in a step, N candidates, packed.

    Attributes:
        guided: whether each canvas has an unconditional row.
        canvas_index: ``(N,)`` int64, ascending.
        positions: ``(N,)`` int64, from the answer's start.
        rows: ``(N,)`` int64: the packed rows that predict them.
        counts: of each canvas, on the host.
        first, uncond_offset: where the group's part of ``PackedForward.logits_indices``
            begins: N of the canvases, and those of the unconditional ones.
    """

    guided: list[bool]
    canvas_index: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    counts: list[int]
    first: int = 0
    uncond_offset: int = 0

    @property
    def num_free(self) -> int:
        """Rows of the unconditional canvases."""
        return sum(compress(self.counts, self.guided))

    def first_of(self, counts: list[int]) -> Candidates:
        """As many as there are; behind them nothing was meant."""
        num = sum(counts)
        if num == len(self.rows):
            return replace(self, counts=counts)
        tensors = (self.canvas_index[:num], self.positions[:num], self.rows[:num])
        return Candidates(self.guided, *tensors, counts)

    def of_guided(self) -> torch.Tensor:
        """``(num_free,)`` int64: the candidates of guided canvases."""
        rows = np.flatnonzero(np.repeat(self.guided, self.counts))
        return torch.from_numpy(rows).to(self.positions.device, non_blocking=True)


@dataclass
class PackedForward:
    """The packed batch of T tokens: the canvases' windows back to back, group by
    group, then the unconditional rows of those that have one.

    Attributes:
        rows: what is packed.
        positions: ``(T,)`` int64, in the canvas.
        input_ids: ``(T,)`` int64.
        logits_indices: ``(N + U,)`` int64: which of the T predict the candidates, of
            the canvases and then of the unconditional ones.
        groups: the candidates, in the order of the groups.
    """

    rows: list[Row]
    positions: torch.Tensor
    input_ids: torch.Tensor
    _answer_at: torch.Tensor
    _answer_from: torch.Tensor
    _predicted_at: list[torch.Tensor]
    logits_indices: torch.Tensor = field(init=False)
    groups: list[Candidates] = field(default_factory=list)
    _expected: list[Candidates] = field(default_factory=list)

    @classmethod
    def of(
        cls, groups: Sequence[tuple[CanvasBatch, list[bool]]], device: torch.device
    ) -> PackedForward:
        """Pack the windows that the canvases' next forwards recompute."""
        rows, answers, first = [], [], 0
        for canvases, _ in groups:
            for index, canvas in enumerate(canvases.records):
                rows.append(Row(canvas))
                answers.append(first + index * canvases.max_answer_len)
            first += len(canvases) * canvases.max_answer_len
        own = list(zip(rows, answers, strict=True))
        flags = [flag for _, guided in groups for flag in guided]
        free = [
            (Row(row.canvas, True), answer)
            for (row, answer), flag in zip(own, flags, strict=True)
            if flag
        ]
        packed = own + free
        lens = [row.length for row, _ in packed]
        offsets = np.cumsum([0, *lens])[:-1]
        at, source = _answer_indices(packed, offsets)
        first_of = {
            (id(row.canvas), row.is_unconditional): offset
            for (row, _), offset in zip(packed, offsets, strict=True)
        }
        return cls(
            [row for row, _ in packed],
            _upload(
                np.concatenate([np.arange(*r.canvas.window) for r, _ in packed]), device
            ),
            _upload(np.concatenate([_ids(row) for row, _ in packed]), device),
            _upload(at, device),
            _upload(source, device),
            [_predicted_at(canvases, first_of) for canvases, _ in groups],
        )

    @property
    def lens(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self.rows]

    @staticmethod
    def key_of(canvases: Sequence[Canvas]) -> tuple[tuple[int, tuple[int, int]], ...]:
        """Equal where a layout can be used again: same canvases, same windows."""
        return tuple((id(canvas), canvas.window) for canvas in canvases)

    def expect(self, groups: Sequence[tuple[CanvasBatch, list[bool]]]) -> None:
        """Do what ``update`` can do before the host knows how many candidates there
        are: of every group, look for some more than there were. What is found behind
        the last one is not meant, and ``logits_indices`` are the first group's."""
        answers = torch.cat([canvases.ids.flatten() for canvases, _ in groups])
        self.input_ids[self._answer_at] = answers[self._answer_from]
        self._expected = [
            _candidates(canvases, guided, rows[0], power_of_two(_num_known(canvases)))
            for (canvases, guided), rows in zip(groups, self._predicted_at, strict=True)
        ]
        self.logits_indices = self._expected[0].rows

    def forget_expected(self) -> None:
        """The ids and the candidates have changed since ``expect``."""
        self._expected = []

    def update(self, groups: Sequence[tuple[CanvasBatch, list[bool]]]) -> None:
        """Bring the ids and the candidates up to date with the canvases."""
        if not self._expected:
            self.expect(groups)
        self.groups = []
        rows: list[torch.Tensor] = []
        free: list[torch.Tensor] = []
        num_free = sum(_num_known(canvases) for canvases, _ in groups)
        num = 0
        for (canvases, guided), predicted_at, expected in zip(
            groups, self._predicted_at, self._expected, strict=True
        ):
            counts = [canvas.num_candidates for canvas in canvases.records]
            if sum(counts) > len(expected.rows):
                expected = _candidates(canvases, guided, predicted_at[0], sum(counts))
            group = expected.first_of(counts)
            group.first, group.uncond_offset = num, num_free
            rows.append(group.rows)
            if any(guided):
                at = group.of_guided()
                canvas_index, positions = group.canvas_index[at], group.positions[at]
                free.append(predicted_at[1, canvas_index, positions])
            num += len(group.rows)
            num_free += group.num_free
            self.groups.append(group)
        parts = rows + free
        # One part is still the rows that were expected, of which graphs make use.
        self.logits_indices = torch.cat(parts) if parts[1:] else parts[0]


def power_of_two(number: int) -> int:
    """The least one that is not less, from 32 on: of how many candidates a forward is
    laid out and captured for, so that few sizes serve all."""
    return 1 << max(5, (number - 1).bit_length())


def _upload(values: IdArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _ids(row: Row) -> IdArray:
    """The row's ids, of which the answer's are only a place to be filled."""
    canvas = row.canvas
    start, end = canvas.window
    ids = canvas.ids[start:end].copy()
    if row.is_unconditional:
        ids[: max(0, canvas.prompt_len - start)] = canvas.mask_id
    return ids


def _answer_indices(
    packed: Sequence[tuple[Row, int]], offsets: IdArray
) -> tuple[IdArray, IdArray]:
    """Where the answers' tokens are in the packed batch, and in the canvases' ids."""
    at: list[IdArray] = []
    source: list[IdArray] = []
    for (row, answer), offset in zip(packed, offsets, strict=True):
        start, end = row.canvas.window
        prompt_len = row.canvas.prompt_len
        first = max(start, prompt_len)
        at.append(np.arange(first, end) - start + offset)
        source.append(np.arange(first, end) - prompt_len + answer)
    return np.concatenate(at), np.concatenate(source)


def _predicted_at(
    canvases: CanvasBatch, offsets: Mapping[tuple[int, bool], int]
) -> torch.Tensor:
    """``(2, R, A)`` int64: the packed index that predicts each position, of each
    canvas's own row and of its unconditional one. Positions whose index is in front of
    the window, or behind it, have its first or its last.

    Args:
        offsets: of each packed row, by the id of its canvas and whether it is
            unconditional, the index of its first token.
    """
    shift = canvases.facts.family.shift
    bounds = np.zeros((3, 2, len(canvases), 1), dtype=np.int64)
    for index, canvas in enumerate(canvases.records):
        start, end = canvas.window
        ahead = canvas.prompt_len - shift - start
        for which in (False, True):
            first = offsets.get((id(canvas), which), 0)
            last = first + end - start - 1
            bounds[:, int(which), index, 0] = first + ahead, first, last
    zero, first, last = _upload(bounds, canvases.device)
    return (zero + canvases.positions).clamp(first, last)


def _num_known(canvases: CanvasBatch) -> int:
    """Candidates of the next forward, or of the one before, as the host knows."""
    return sum(canvas.num_candidates for canvas in canvases.records)


def _candidates(
    canvases: CanvasBatch, guided: list[bool], predicted_at: torch.Tensor, size: int
) -> Candidates:
    """The first ``size`` candidates; where there are fewer, anything behind them."""
    assert canvases.step is not None, "no step is planned"
    # With a size, the device is not asked how many there are.
    found = torch.nonzero_static(canvases.step.candidates, size=size, fill_value=0)
    canvas_index, positions = found.unbind(dim=1)
    rows = predicted_at[canvas_index, positions]
    counts = [canvas.num_candidates for canvas in canvases.records]
    return Candidates(guided, canvas_index, positions, rows, counts)
