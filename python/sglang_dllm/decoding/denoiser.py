"""Denoising steps of a mixed batch: what to compute, then what to commit.

The denoiser holds the canvases of all requests on the device, in groups of one
algorithm and one cache strategy. It chooses the next step when it commits a step, so
that one transfer tells the host both what was committed and what comes next. Only
``sync`` waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.caches.base import (
    CacheStrategy,
    Windows,
    whole_canvases,
)
from sglang_dllm.decoding.canvas import Canvas, IdArray, Progress
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Device
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.forward_limit import accept_all, widen
from sglang_dllm.decoding.guard import Guard, text_of
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.statistics import Statistic, check_statistics
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows, check_rows
from sglang_dllm.models.facts import ModelFacts

logger = logging.getLogger(__name__)

MAX_FORWARDS = 100_000
"""The most forwards of one request, and the most steps that any option asks for."""

GroupKey: TypeAlias = tuple[Algorithm[Any, Any], str]


@dataclass
class Group:
    """The canvases that one algorithm and one cache strategy decode together.

    Attributes:
        statistics: what the algorithm reads of the logits.
        changes_logits: whether it changes the logits first for some canvas.
        cache_state: the tensors of the cache strategy.
        windows: start and end ``(R,)`` int64 of the windows of the next forward.
    """

    algorithm: Algorithm[Any, Any]
    cache: CacheStrategy[Any, Any]
    statistics: tuple[Statistic, ...]
    changes_logits: bool
    batch: CanvasBatch[Any, Any]
    cache_state: TensorRows
    windows: Windows

    @property
    def key(self) -> GroupKey:
        return self.algorithm, self.cache.name

    @property
    def records(self) -> list[Canvas]:
        return self.batch.records

    def select(self, rows: Sequence[int]) -> Group:
        """Some of the canvases."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.batch.device)
        return Group(
            self.algorithm,
            self.cache,
            self.statistics,
            self.changes_logits,
            self.batch.select(rows, index),
            self.cache_state.select(rows, index),
            Windows(*(bound[index] for bound in self.windows)),
        )

    def joined(self, other: Group) -> Group:
        """These canvases, then the others of the same key.

        Raises:
            TypeError: the algorithm's states do not fit each other.
        """
        return Group(
            self.algorithm,
            self.cache,
            self.statistics,
            self.changes_logits or other.changes_logits,
            self.batch.joined(other.batch),
            self.cache_state.joined(other.cache_state),
            Windows(*map(torch.cat, zip(self.windows, other.windows, strict=True))),
        )

    def choose_next_step(self) -> None:
        """Ask the algorithm and the cache strategy for the next step."""
        batch = self.batch
        step = self.algorithm.next_step(batch)
        step.check(len(batch), batch.max_answer_len)
        # After ``next_step``, which may fill the masks behind an EOS.
        batch.update_done()
        step = widen(batch, step)
        candidates = step.candidates & ~batch.rows.done[:, None]
        batch.set_step(Step(candidates, step.start, step.end))
        self.windows = self.cache.next_windows(batch, self.cache_state, step)

    def expect_full_windows(self) -> None:
        """The keys and values in the pool are lost: the next windows are full."""
        self.windows = whole_canvases(self.batch)
        for canvas in self.records:
            canvas.expect_full_window()

    def guard(self) -> Guard:
        """Let an error of the algorithm end the group's requests and no others."""
        return Guard(self._fail)

    def _fail(self, error: Exception) -> None:
        logger.error("%s failed", self.algorithm.name, exc_info=error)
        for canvas in self.records:
            canvas.fail(f"{self.algorithm.name}: {text_of(error)}")


class Denoiser:
    """All canvases that are being decoded. The scheduler's thread is the only user.

    A denoising step is ``pack``, a forward, ``commit``, then ``join`` for the canvases
    that arrived during the forward, ``expect`` and ``sync``. Between ``pack`` and
    ``commit`` no canvas may join or leave: the packed forward was made of them.
    """

    def __init__(self, facts: ModelFacts, device: Device = "cpu") -> None:
        self.facts = facts
        self.device = torch.device(device)
        self._groups: dict[GroupKey, Group] = {}
        self._packed: PackedForward | None = None

    @property
    def canvases(self) -> list[Canvas]:
        """In the order of a forward's windows."""
        return [c for group in self._groups.values() for c in group.records]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that the algorithms in use read, in one order."""
        groups = self._groups.values()
        return tuple(sorted({s for group in groups for s in group.statistics}))

    def prepare(self, canvas: Canvas, decoding: Decoding) -> Group:
        """A canvas with nothing decoded and its first step, ready to ``join``.

        Does not wait for the device, so that a forward may be in flight.

        Args:
            decoding: the result of ``Decoding.finalized``.

        Raises:
            Exception: whatever the algorithm raises.
        """
        algorithm, options = decoding.algorithm, decoding.options
        batch = CanvasBatch.of(canvas, options, self.facts, self.device)
        state = algorithm.begin(batch, options)
        check_rows(state, algorithm.state, num_rows=1)
        batch.start(state)
        group = Group(
            algorithm,
            decoding.cache,
            check_statistics(algorithm.statistics),
            bool(algorithm.changes_logits(options)),
            batch,
            decoding.cache.begin(batch, decoding.cache_options, options),
            whole_canvases(batch),
        )
        group.choose_next_step()
        return group

    def join(self, group: Group) -> None:
        """Take a prepared or parked canvas in. ``sync`` tells the host its window.

        A canvas whose state does not fit the others of its group fails.
        """
        there = self._groups.get(group.key)
        with group.guard():
            self._groups[group.key] = there.joined(group) if there else group
            self._packed = None

    def remove(self, canvases: Sequence[Canvas]) -> None:
        """Forget canvases. No forward may be in flight."""
        leaving = set(map(id, canvases))
        for key, group in list(self._groups.items()):
            stays = [i for i, c in enumerate(group.records) if id(c) not in leaving]
            if len(stays) < len(group.records):
                self._packed = None
                if stays:
                    self._groups[key] = group.select(stays)
                else:
                    del self._groups[key]

    def park(self, canvas: Canvas) -> Group:
        """Take a canvas out with all its state; ``join`` takes it in again.

        Its keys and values may be gone by then, so that it goes on with a forward over
        the whole canvas. No forward may be in flight.
        """
        group = next(g for g in self._groups.values() if canvas in g.records)
        parked = group.select([group.records.index(canvas)])
        self.remove([canvas])
        parked.expect_full_windows()
        return parked

    def pack(self) -> PackedForward:
        """The next forward. The host must know all windows (``sync``)."""
        batches = [group.batch for group in self._groups.values()]
        if self._packed is None or not self._packed.is_of(self.canvases):
            self._packed = PackedForward.of(batches, self.device)
        self._packed.update(batches)
        return self._packed

    def commit(self, logits: Logits) -> None:
        """Commit one step of every canvas, and choose the next step.

        Args:
            logits: ``(N + U, V)``: of the tokens ``pack().logits_indices``.
        """
        assert self._packed is not None, "no forward was packed"
        packed, groups = self._packed, list(self._groups.values())
        for index, group in enumerate(groups):
            for canvas in group.records:
                canvas.count_forward()
            inputs = packed.inputs_of(index, group.batch, logits)
            self._measure(group, inputs)
            with group.guard() as guard:
                _decide(group, inputs)
                group.choose_next_step()
            if guard.caught:
                self.remove(group.records)
        packed.forget_expected()

    def expect(self) -> PackedForward | None:
        """Prepare the next packed forward before the host knows the windows.

        Returns:
            The packed forward, valid if all windows stay the same. It may list too
            many candidates. None if canvases joined or left, or if there are several
            groups or guided canvases, whose candidates are not contiguous.
        """
        if self._packed is None:
            return None
        batches = [group.batch for group in self._groups.values()]
        self._packed.expect(batches)
        is_one = len(batches) == 1 and not any(c.is_guided for c in self.canvases)
        return self._packed if is_one else None

    def sync(self) -> None:
        """Wait for the last commit, and update the ``Canvas`` records.

        One transfer brings a table of each group: its answers, -1 where masked, and
        the numbers of ``Progress``.
        """
        groups = list(self._groups.values())
        if not groups:
            return
        tables = [_table(group) for group in groups]
        flat = [table.flatten() for table in tables]
        host = (torch.cat(flat) if flat[1:] else flat[0]).cpu().numpy()
        first = 0
        for group, table in zip(groups, tables, strict=True):
            rows = host[first : first + table.numel()].reshape(table.shape)
            first += table.numel()
            for canvas, row in zip(group.records, rows, strict=True):
                numbers = row[group.batch.max_answer_len :].tolist()
                canvas.update(row[: canvas.answer_len], _progress(*numbers))
                self._check(canvas, row[: canvas.answer_len])

    def _check(self, canvas: Canvas, answer: IdArray) -> None:
        """Fail a canvas that an algorithm from outside led astray.

        A window that is none would shift the tokens of all other requests, and a token
        outside the vocabulary would end the process in the embedding.
        """
        start, end = canvas.window
        if ((answer < -1) | (answer >= self.facts.vocab_size)).any():
            canvas.fail("the algorithm committed a token outside the vocabulary")
        elif canvas.done:
            return
        elif not 0 <= start < end <= len(canvas):
            canvas.fail(f"the algorithm decodes no window: {start} to {end}")
        elif canvas.num_forwards >= MAX_FORWARDS:
            canvas.fail(f"no end after {MAX_FORWARDS} forwards")

    def _measure(self, group: Group, inputs: StepInputs[Any, Any]) -> None:
        """Compute the statistics that the algorithm always reads.

        With tensor parallelism the head has collectives, so this happens outside of
        the guard. Changed logits are the algorithm's own, which it measures itself.
        """
        if inputs.num_candidates and not group.changes_logits:
            for statistic in group.statistics:
                inputs.logits.measure(statistic, self.facts.mask_id)


def _decide(group: Group, inputs: StepInputs[Any, Any]) -> None:
    """Write what the algorithm accepts to its canvases."""
    decision = group.algorithm.decide(inputs)
    decision.check(inputs.num_candidates)
    accepted = accept_all(inputs, decision)
    group.batch.commit(inputs.canvas_index, inputs.positions, accepted, decision.tokens)
    group.algorithm.on_commit(inputs, accepted, decision)


def _table(group: Group) -> torch.Tensor:
    """``(R, A + 7)`` int64: the answers, -1 where masked, then ``Progress``."""
    rows, step = group.batch.rows, group.batch.step
    assert step is not None
    numbers = (
        rows.num_forwards,
        rows.num_committed,
        rows.cut_short.long(),
        rows.done.long(),
        step.candidates.sum(dim=1),
        *group.windows,
    )
    answers = rows.ids.masked_fill(rows.masked, -1)
    return torch.cat([answers, torch.stack(numbers, dim=1)], dim=1)


def _progress(
    num_forwards: int,
    num_committed: int,
    cut_short: int,
    done: int,
    num_candidates: int,
    start: int,
    end: int,
) -> Progress:
    return Progress(
        num_forwards,
        num_committed,
        bool(cut_short),
        bool(done),
        num_candidates,
        (start, end),
    )
