"""How the windows of a step are packed into one forward, ragged and unpadded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, TypeAlias

import numpy as np
import torch

from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.lengths.base import Probes
from sglang_dllm.decoding.logits import Candidates, Logits, LogitsOf
from sglang_dllm.decoding.tensor_rows import indices
from sglang_dllm.decoding.window import Window

Batch: TypeAlias = CanvasBatch[Any, Any]


@dataclass(frozen=True)
class PackedWindow:
    """One window of the forward, of the canvas itself or of its unconditional form."""

    canvas: Canvas
    is_uncond: bool = False

    @property
    def num_tokens(self) -> int:
        start, end = self.canvas.window
        return end - start


@dataclass
class GroupCandidates:
    """The N candidates of one group of R canvases in a step, packed.

    Attributes:
        guided: whether each canvas has an unconditional window.
        canvas_index: ``(N,)`` int64, ascending.
        positions: ``(N,)`` int64, from the answer's start.
        logits_indices: ``(N,)`` int64: the packed tokens that predict them.
        counts: candidates of each canvas, on the host.
        offset: index of the group's first candidate in
            ``PackedForward.logits_indices``.
        uncond_offset: index of its first unconditional candidate there.
    """

    guided: list[bool]
    canvas_index: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor
    counts: list[int]
    offset: int
    uncond_offset: int

    @property
    def num_uncond(self) -> int:
        """Candidates of the unconditional canvases."""
        return sum(compress(self.counts, self.guided))

    def of_guided(self) -> torch.Tensor:
        """``(num_uncond,)`` int64: the candidates of guided canvases."""
        found = np.flatnonzero(np.repeat(self.guided, self.counts))
        return torch.from_numpy(found).to(self.positions.device, non_blocking=True)


@dataclass
class ProbedPositions:
    """The P answer positions that a length rule measures in one group, packed.

    Canvases with smaller windows have none: these do not compute the whole answer.

    Attributes:
        canvas_index: ``(P,)`` int64, ascending.
        positions: ``(P,)`` int64, from ``Canvas.answer_start``.
        logits_indices: ``(P,)`` int64: the packed tokens that predict them.
    """

    canvas_index: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor

    @classmethod
    def of(
        cls, batch: Batch, offset_of: Mapping[tuple[int, bool], int]
    ) -> ProbedPositions:
        """
        Args:
            offset_of: the first token of each packed window, by the id of its canvas
                and whether it is unconditional.
        """
        shift = batch.facts.family.shift
        found = np.zeros((3, 0), dtype=np.int64)
        for index, canvas in enumerate(batch.records):
            if canvas.window != (0, len(canvas)):
                continue
            places = np.arange(canvas.answer_start, len(canvas))
            at = offset_of[id(canvas), False] + np.maximum(places - shift, 0)
            rows = [np.full_like(places, index), places - canvas.answer_start, at]
            found = np.concatenate([found, rows], axis=1)
        return cls(*_upload(found, batch.device))


@dataclass
class PackedForward:
    """The windows of all canvases back to back, T tokens.

    The windows of the canvases come first, group by group, then the unconditional
    windows of those that have one.

    Attributes:
        windows: for attention.
        canvases: the canvas of each window.
        positions: ``(T,)`` int64, in the canvas.
        input_ids: ``(T,)`` int64.
        logits_indices: ``(N + U + P,)`` int64: which of the T predict the candidates,
            of the canvases, then of the unconditional ones, then what length rules
            measure.
    """

    windows: list[Window]
    canvases: list[Canvas]
    positions: torch.Tensor
    input_ids: torch.Tensor
    _key: list[tuple[int, tuple[int, int]]]
    _answer_at: torch.Tensor
    _answer_from: torch.Tensor
    _predicted_at: list[torch.Tensor]
    _probed: list[ProbedPositions | None]
    logits_indices: torch.Tensor = field(init=False)
    _candidates: list[GroupCandidates] = field(default_factory=list)

    @classmethod
    def of(
        cls, batches: Sequence[Batch], probed: Sequence[bool], device: torch.device
    ) -> PackedForward:
        """Pack the windows of the canvases' next forwards.

        Args:
            probed: whether a length rule measures the canvases of each batch.
        """
        own: list[tuple[PackedWindow, int]] = []
        first = 0
        for batch in batches:
            for index, canvas in enumerate(batch.records):
                answer = first + index * batch.max_answer_len
                own.append((PackedWindow(canvas), answer))
            first += len(batch) * batch.max_answer_len
        uncond = [
            (PackedWindow(window.canvas, is_uncond=True), answer)
            for window, answer in own
            if window.canvas.is_guided
        ]
        packed = own + uncond
        offsets = np.cumsum([0, *(window.num_tokens for window, _ in packed)])[:-1]
        at, source = _answer_indices(packed, offsets)
        offset_of = {
            (id(window.canvas), window.is_uncond): offset
            for (window, _), offset in zip(packed, offsets, strict=True)
        }
        canvases = [window.canvas for window, _ in packed]
        positions = [np.arange(*canvas.window) for canvas in canvases]
        return cls(
            [_window_of(canvas) for canvas in canvases],
            canvases,
            _upload(np.concatenate(positions), device),
            _upload(np.concatenate([_ids(window) for window, _ in packed]), device),
            _key_of([window.canvas for window, _ in own]),
            _upload(at, device),
            _upload(source, device),
            [_predicted_at(batch, offset_of) for batch in batches],
            [
                ProbedPositions.of(batch, offset_of) if is_probed else None
                for batch, is_probed in zip(batches, probed, strict=True)
            ],
        )

    @property
    def lens(self) -> list[int]:
        """Tokens of each window."""
        return [window.num_tokens for window in self.windows]

    @property
    def num_uncond(self) -> int:
        """Unconditional windows, which are the last ones."""
        return len(self.windows) - len(self._key)

    def token_slots(self) -> torch.Tensor:
        """``(T,)`` int64: the KV slot of each token.

        The unconditional window of a guided canvas has the slots of the first one. Its
        forward attends to fresh keys and values, and keeps none in the pool.
        """
        pairs = zip(self.canvases, self.windows, strict=True)
        return torch.cat([c.placed_slots[w.start : w.end] for c, w in pairs])

    def is_of(self, canvases: Sequence[Canvas]) -> bool:
        """True if these are the same canvases, with the same windows."""
        return self._key == _key_of(canvases)

    def update(self, batches: Sequence[Batch]) -> None:
        """Bring the ids and the candidates up to date with the canvases."""
        answers = torch.cat([batch.rows.ids.flatten() for batch in batches])
        self.input_ids[self._answer_at] = answers[self._answer_from]
        self._candidates = []
        own: list[torch.Tensor] = []
        uncond: list[torch.Tensor] = []
        num, num_uncond = 0, sum(map(_num_candidates, batches))
        for batch, predicted_at in zip(batches, self._predicted_at, strict=True):
            group = _find_candidates(batch, predicted_at[0], num, num_uncond)
            own.append(group.logits_indices)
            if any(group.guided):
                at = group.of_guided()
                canvas_index, positions = group.canvas_index[at], group.positions[at]
                uncond.append(predicted_at[1, canvas_index, positions])
            num += len(group.positions)
            num_uncond += group.num_uncond
            self._candidates.append(group)
        probes = [probed.logits_indices for probed in self._probed if probed]
        parts = own + uncond + probes
        self.logits_indices = torch.cat(parts) if parts[1:] else parts[0]

    def probes_of(self, group: int, logits: Logits) -> Probes | None:
        """The probes of one group; None where no length rule measures it.

        Args:
            group: index of the group.
            logits: ``(N + U + P, V)`` of ``logits_indices``.
        """
        probed = self._probed[group]
        if probed is None:
            return None
        lens = [len(one.positions) if one else 0 for one in self._probed]
        first = len(self.logits_indices) - sum(lens[group:])
        part = logits.part(first, lens[group])
        return Probes(probed.canvas_index, probed.positions, part)

    def inputs_of(
        self, group: int, batch: Batch, logits: Logits
    ) -> StepInputs[Any, Any]:
        """The part of the forward on which one group's algorithm decides.

        Args:
            group: index of the group.
            logits: ``(N + U + P, V)`` of ``logits_indices``.
        """
        candidates, step = self._candidates[group], batch.step
        assert step is not None, "no step is chosen"
        return StepInputs(
            batch=batch,
            step=step,
            canvas_index=candidates.canvas_index,
            positions=candidates.positions,
            counts=candidates.counts,
            logits=logits.part(candidates.offset, len(candidates.positions)),
            uncond_logits_of=_uncond_logits_of(candidates, logits),
        )


def _uncond_logits_of(candidates: GroupCandidates, logits: Logits) -> LogitsOf | None:
    if not candidates.num_uncond:
        return None
    at = torch.full_like(candidates.positions, candidates.uncond_offset)
    at[candidates.of_guided()] += indices(candidates.num_uncond, at.device)

    def uncond_logits_of(some: Candidates) -> torch.Tensor:
        return logits(at[some])

    return uncond_logits_of


def _window_of(canvas: Canvas) -> Window:
    kv_slots = canvas.kv_slots if canvas.has_cache else None
    return Window(*canvas.window, len(canvas), kv_slots)


def _key_of(canvases: Sequence[Canvas]) -> list[tuple[int, tuple[int, int]]]:
    return [(id(canvas), canvas.window) for canvas in canvases]


def _upload(values: IdArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _ids(window: PackedWindow) -> IdArray:
    """The window's ids. ``update`` overwrites those of the answer on the device.

    The unconditional canvas has masks where the request gave text, as LLaDA's has.
    """
    canvas = window.canvas
    start, end = canvas.window
    ids = canvas.ids[start:end].copy()
    if window.is_uncond:
        ids[canvas.fixed[start:end]] = canvas.mask_id
    return ids


def _answer_indices(
    packed: Sequence[tuple[PackedWindow, int]], offsets: IdArray
) -> tuple[IdArray, IdArray]:
    """The answers' tokens in the packed forward, and in the ids of all batches."""
    at: list[IdArray] = []
    source: list[IdArray] = []
    for (window, answer), offset in zip(packed, offsets, strict=True):
        start, end = window.canvas.window
        prompt_len = window.canvas.prompt_len
        places = np.arange(max(start, prompt_len), end)
        if window.is_uncond:
            places = places[~window.canvas.fixed[places]]
        at.append(places - start + offset)
        source.append(places - prompt_len + answer)
    return np.concatenate(at), np.concatenate(source)


def _predicted_at(
    batch: Batch, offset_of: Mapping[tuple[int, bool], int]
) -> torch.Tensor:
    """``(2, R, A)`` int64: the packed token that predicts each position.

    The first half is for the canvas's own window, the second for its unconditional
    one. A position outside of the window gets the window's first or last token.

    Args:
        offset_of: the first token of each packed window, by the id of its canvas and
            whether it is unconditional.
    """
    shift = batch.facts.family.shift
    bounds = np.zeros((3, 2, len(batch), 1), dtype=np.int64)
    for index, canvas in enumerate(batch.records):
        start, end = canvas.window
        ahead = canvas.prompt_len - shift - start
        for is_uncond in (False, True):
            first = offset_of.get((id(canvas), is_uncond), 0)
            last = first + end - start - 1
            bounds[:, int(is_uncond), index, 0] = first + ahead, first, last
    zero, first, last = _upload(bounds, batch.device)
    return (zero + batch.positions).clamp(first, last)


def _num_candidates(batch: Batch) -> int:
    """Candidates of the next forward, which the last ``sync`` told the host."""
    return sum(canvas.num_candidates for canvas in batch.records)


def _find_candidates(
    batch: Batch, predicted_at: torch.Tensor, offset: int, uncond_offset: int
) -> GroupCandidates:
    assert batch.step is not None, "no step is chosen"
    counts = [canvas.num_candidates for canvas in batch.records]
    # A known ``size`` avoids a wait for the device.
    found = torch.nonzero_static(batch.step.candidates, size=sum(counts))
    canvas_index, positions = found.unbind(dim=1)
    return GroupCandidates(
        [canvas.is_guided for canvas in batch.records],
        canvas_index,
        positions,
        predicted_at[canvas_index, positions],
        counts,
        offset,
        uncond_offset,
    )
