"""Denoising steps of a mixed batch: what to compute, then what to commit.

The decoder holds the canvases of all requests, grouped by algorithm, on the device. A
step's plan is made when the step before has committed, so that one transfer tells the
host both what was committed and what comes next. Only ``sync`` waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_dllm.decoding import cache
from sglang_dllm.decoding.algorithm import Algorithm, StepInputs
from sglang_dllm.decoding.cache import Windows
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Device, indices
from sglang_dllm.decoding.logits import Logits, Rows
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.packing import Candidates, PackedForward
from sglang_dllm.decoding.selection import count
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.models.facts import ModelFacts

logger = logging.getLogger(__name__)

MAX_FORWARDS = 100_000
"""Of one request; the most steps that any option asks for."""


@dataclass
class Group:
    """The canvases of one algorithm.

    Attributes:
        windows: start and end ``(R,)`` int64 of what the next forward computes.
    """

    algorithm: Algorithm
    canvases: CanvasBatch
    windows: Windows


class Denoiser:
    """All canvases that are being decoded. The scheduler's thread is the only user.

    A denoising step is ``pack``, a forward, ``commit``, then ``join`` for the canvases
    that arrived during the forward, ``expect`` and ``sync``. Between ``pack`` and
    ``commit`` no canvas may join or leave: the packed batch was made of them.
    """

    def __init__(self, facts: ModelFacts, device: Device = "cpu") -> None:
        self.facts = facts
        self.device = torch.device(device)
        self._groups: dict[Algorithm, Group] = {}
        self._packed: PackedForward | None = None
        self._key: object = None

    @property
    def canvases(self) -> list[Canvas]:
        """In the order of a forward's windows."""
        groups = self._groups.values()
        return [canvas for group in groups for canvas in group.canvases.records]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the algorithms in use read of the logits, in one order."""
        wanted = {s for algorithm in self._groups for s in algorithm.statistics}
        return tuple(sorted(wanted))

    def prepare(self, canvas: Canvas, algorithm: Algorithm, options: Options) -> Group:
        """A canvas with nothing decoded and its first step, ready to ``join``.

        Does not wait for the device, so that a forward may be in flight.

        Raises:
            Exception: whatever the algorithm raises.
        """
        canvases = CanvasBatch.of(canvas, options, self.facts, self.device)
        canvases.state = algorithm.begin(canvases)
        canvases.cache = cache.begin(canvases)
        return Group(algorithm, canvases, _plan(algorithm, canvases))

    def join(self, group: Group) -> None:
        """Take a prepared or parked canvas in. ``sync`` tells the host its window."""
        there = self._groups.get(group.algorithm)
        try:
            if there is not None:
                group = Group(
                    group.algorithm,
                    there.canvases.joined(group.canvases),
                    _joined(there.windows, group.windows),
                )
        except Exception as error:  # may be a third party's state
            _fail(group.algorithm, group.canvases, error)
            return
        self._packed = None
        self._groups[group.algorithm] = group

    def remove(self, canvases: Sequence[Canvas]) -> None:
        """Forget canvases. No forward may be in flight."""
        leaving = set(map(id, canvases))
        for algorithm, group in list(self._groups.items()):
            records = group.canvases.records
            stays = [i for i, c in enumerate(records) if id(c) not in leaving]
            if len(stays) < len(records):
                self._packed = None
                if stays:
                    self._groups[algorithm] = _selected(group, stays)
                else:
                    del self._groups[algorithm]

    def park(self, canvas: Canvas) -> Group:
        """Take a canvas out with all its state; ``join`` takes it in again.

        Its keys and values may be gone by then, so that it goes on with a forward over
        the whole canvas. No forward may be in flight.
        """
        group, index = next(
            (group, group.canvases.records.index(canvas))
            for group in self._groups.values()
            if canvas in group.canvases.records
        )
        parked = _selected(group, [index])
        self.remove([canvas])
        length = parked.canvases.prompt_len + parked.canvases.answer_len
        parked.windows = (torch.zeros_like(length), length)
        canvas.window = (0, len(canvas))
        return parked

    def pack(self) -> PackedForward:
        """The next forward. The host must know all windows (``sync``)."""
        groups = self._guided()
        key = PackedForward.key_of(self.canvases)
        if self._packed is None or self._key != key:
            self._packed = PackedForward.of(groups, self.device)
            self._key = key
        self._packed.update(groups)
        return self._packed

    def commit(self, logits: Logits) -> None:
        """Commit what one forward decides in every canvas, and plan the next step.

        Args:
            logits: ``(N + U, V)``: of the tokens ``pack().logits_indices``.
        """
        assert self._packed is not None, "no forward was packed"
        pairs = zip(list(self._groups.items()), self._packed.groups, strict=True)
        for (algorithm, group), candidates in pairs:
            canvases = group.canvases
            _count_rows(canvases)
            try:
                judged = _judged(canvases, candidates, logits)
                _commit(algorithm, judged)
                group.windows = _plan(algorithm, canvases)
            except Exception as error:  # may be a third party's code
                _fail(algorithm, canvases, error)
                self.remove(canvases.records)
        if self._packed is not None:
            self._packed.forget_expected()

    def expect(self) -> PackedForward | None:
        """Prepare the next packed forward before the host knows the windows.

        Returns:
            The packing that stays if no window moves. Its list of candidates may be
            too long. None where the canvases changed, or where several algorithms or
            guidance keep the candidates apart.
        """
        if self._packed is None:
            return None
        groups = self._guided()
        self._packed.expect(groups)
        return self._packed if len(groups) == 1 and not any(groups[0][1]) else None

    def sync(self) -> None:
        """Wait for what was committed and planned, and write it to the canvases."""
        _read_back(list(self._groups.values()))

    def _guided(self) -> list[tuple[CanvasBatch, list[bool]]]:
        """What a packing is made of: each group, and which canvases are guided."""
        return [
            (
                group.canvases,
                [algorithm.is_guided(options) for options in group.canvases.options],
            )
            for algorithm, group in self._groups.items()
        ]


def _plan(algorithm: Algorithm, canvases: CanvasBatch) -> Windows:
    """Plan the next forward of all canvases of an algorithm."""
    step = algorithm.plan(canvases)
    # Not before: planning may have filled what was left behind an EOS.
    canvases.update_done()
    candidates, last = step.candidates, canvases.is_last_forward()
    if last is not None:
        candidates = torch.where(last[:, None], canvases.masked, candidates)
    step = replace(step, candidates=candidates & ~canvases.done[:, None])
    canvases.step = step
    return cache.plan(canvases, step)


def _judged(
    canvases: CanvasBatch, candidates: Candidates, logits: Logits
) -> StepInputs:
    """The part of the forward that one algorithm's canvases are decided by."""
    assert canvases.step is not None
    free_of = None
    if candidates.num_free:
        at = torch.full_like(candidates.positions, candidates.uncond_offset)
        at[candidates.of_guided()] += indices(candidates.num_free, at.device)

        def free_of(rows: Rows) -> torch.Tensor:
            return logits(at[rows])

    return StepInputs(
        canvases=canvases,
        step=canvases.step,
        canvas_index=candidates.canvas_index,
        positions=candidates.positions,
        counts=candidates.counts,
        logits_of=logits.part(candidates.first, len(candidates.positions)),
        uncond_logits_of=free_of,
    )


def _commit(algorithm: Algorithm, judged: StepInputs) -> None:
    """Write what the algorithm accepts to its canvases."""
    canvases, canvas, positions = judged.canvases, judged.canvas_index, judged.positions
    choice = algorithm.choose(judged)
    if not choice.accepted.shape == choice.tokens.shape == positions.shape:
        shape = tuple(positions.shape)
        raise ValueError(f"accepted and tokens must have the shape {shape}")
    accepted, last = choice.accepted, canvases.is_last_forward()
    if last is not None:
        left_out = last[canvas] & ~accepted
        accepted = accepted | last[canvas]
        cut_short = count(left_out, canvas, len(canvases)) > 0
        canvases.cut_short = canvases.cut_short | cut_short
    were_masked = canvases.masked[canvas, positions]
    num_committed = count(accepted & were_masked, canvas, len(canvases))
    canvases.num_committed = canvases.num_committed + num_committed
    before = canvases.ids[canvas, positions]
    canvases.ids[canvas, positions] = torch.where(accepted, choice.tokens, before)
    canvases.masked[canvas, positions] = were_masked & ~accepted
    canvases.num_forwards = canvases.num_forwards + ~canvases.done
    algorithm.committed(judged, accepted, choice)


def _count_rows(canvases: CanvasBatch) -> None:
    for canvas, options in zip(canvases.records, canvases.options, strict=True):
        start, end = canvas.window
        canvas.tokens_computed += end - start
        canvas.tokens_cached += len(canvas) - (end - start)
        is_full = end - start == len(canvas)
        canvas.full_refreshes += is_full and options.cache != "none"


def _fail(algorithm: Algorithm, canvases: CanvasBatch, error: Exception) -> None:
    """Give up an algorithm's requests; the others of the batch go on."""
    logger.error("%s failed", algorithm.name, exc_info=error)
    for canvas in canvases.records:
        canvas.failure = f"{algorithm.name}: {error}"


def _selected(group: Group, rows: Sequence[int]) -> Group:
    index = torch.tensor(rows, device=group.canvases.device)
    start, end = group.windows
    windows = (start[index], end[index])
    return Group(group.algorithm, group.canvases.select(rows), windows)


def _joined(some: Windows, others: Windows) -> Windows:
    start, end = (torch.cat(parts) for parts in zip(some, others, strict=True))
    return start, end


def _read_back(groups: Sequence[Group]) -> None:
    """Bring the host's records up to date: what waits for the device."""
    if not groups:
        return
    tables = []
    for group in groups:
        canvases = group.canvases
        assert canvases.step is not None
        numbers = (
            canvases.num_forwards,
            canvases.num_committed,
            canvases.cut_short.long(),
            canvases.done.long(),
            canvases.step.candidates.sum(dim=1),
            *group.windows,
        )
        answers = canvases.ids.masked_fill(canvases.masked, -1)
        tables.append(torch.cat([answers, torch.stack(numbers, dim=1)], dim=1))
    flat = [table.flatten() for table in tables]
    host = (torch.cat(flat) if flat[1:] else flat[0]).cpu().numpy()
    first = 0
    for group, table in zip(groups, tables, strict=True):
        rows = host[first : first + table.numel()].reshape(table.shape)
        first += table.numel()
        for canvas, row in zip(group.canvases.records, rows, strict=True):
            _update(canvas, row, group.canvases.max_answer_len)


def _update(canvas: Canvas, row: np.ndarray, max_answer_len: int) -> None:
    """One row of ``_read_back``'s tables."""
    answer, numbers = row[: canvas.answer_len], row[max_answer_len:].tolist()
    masked = answer < 0
    canvas.masked[canvas.prompt_len :] = masked
    canvas.ids[canvas.prompt_len :] = np.where(masked, canvas.mask_id, answer)
    canvas.num_forwards, canvas.num_committed = numbers[:2]
    canvas.cut_short, canvas.done = map(bool, numbers[2:4])
    canvas.num_candidates = numbers[4]
    canvas.window = (numbers[5], numbers[6])
    if canvas.num_forwards >= MAX_FORWARDS and not canvas.done:
        canvas.failure = f"no end after {MAX_FORWARDS} forwards"
