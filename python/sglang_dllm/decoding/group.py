"""The canvases that one algorithm and one cache strategy decode together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.agreement import Agree
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.bad_words import without_words
from sglang_dllm.decoding.caches.base import (
    CacheStrategy,
    Windows,
    whole_canvases,
)
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Device
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.forward_limit import accept_all, widen
from sglang_dllm.decoding.guard import Guard, message_of
from sglang_dllm.decoding.lengths.base import LengthRule, Probes
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.reveal_table import RevealTable
from sglang_dllm.decoding.statistics import Statistic, check_statistics
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows, check_rows
from sglang_dllm.models.facts import ModelFacts

logger = logging.getLogger(__name__)

GroupKey: TypeAlias = tuple[Algorithm[Any, Any], str, str]

NUM_NUMBERS = 8
"""The numbers of a ``Progress`` in ``Group.table``."""


@dataclass(frozen=True)
class Steering:
    """The things that Python reads in a step. Groups of one steering share a capture.

    Attributes:
        options: stand for the options of every canvas.
    """

    algorithm: Algorithm[Any, Any]
    cache: CacheStrategy[Any, Any]
    options: Options


@dataclass
class Group:
    """The canvases that one algorithm and one cache strategy decode together.

    Attributes:
        statistics: what the algorithm reads of the logits.
        changes_logits: whether it changes the logits first for some canvas.
        cache_state: the tensors of the cache strategy.
        windows: start and end ``(R,)`` int64 of the windows of the next forward.
        length: the length rule that measures the forwards; None where none does.
        measured: ``(R, M)`` float64: what it measured in the last forward.
        reported: ``table`` as the last step left it, if that was a captured one.
        revealed: the tokens that the last step committed, until ``take_revealed``.
            None where no canvas asks for log-probabilities.
    """

    algorithm: Algorithm[Any, Any]
    cache: CacheStrategy[Any, Any]
    statistics: tuple[Statistic, ...]
    changes_logits: bool
    batch: CanvasBatch[Any, Any]
    cache_state: TensorRows
    windows: Windows
    length: LengthRule[Any] | None
    measured: torch.Tensor
    reported: torch.Tensor | None = None
    revealed: RevealTable | None = None

    @classmethod
    def of(
        cls, canvas: Canvas, decoding: Decoding, facts: ModelFacts, device: Device
    ) -> Group:
        """A canvas with nothing decoded and its first step.

        Does not wait for the device, so that a forward may be in flight.

        Args:
            decoding: the result of ``Decoding.finalized``.

        Raises:
            Exception: whatever the algorithm raises.
        """
        algorithm, options = decoding.algorithm, decoding.options
        batch = CanvasBatch.of(canvas, options, facts, device)
        state = algorithm.begin(batch, options)
        check_rows(state, algorithm.state, num_rows=1)
        batch.start(state)
        length = decoding.length if decoding.length.num_measured else None
        num_measured = decoding.length.num_measured
        group = cls(
            algorithm,
            decoding.cache,
            check_statistics(algorithm.statistics),
            bool(algorithm.changes_logits(options)),
            batch,
            decoding.cache.begin(batch, decoding.cache_options, options),
            whole_canvases(batch),
            length,
            torch.zeros((1, num_measured), dtype=torch.float64, device=batch.device),
        )
        group.choose_next_step(commits=not canvas.measures)
        return group

    @property
    def num_measured(self) -> int:
        """M."""
        return 0 if self.length is None else self.length.num_measured

    @property
    def key(self) -> GroupKey:
        length = "" if self.length is None else self.length.name
        return self.algorithm, self.cache.name, length

    @property
    def records(self) -> list[Canvas]:
        return self.batch.records

    @cached_property
    def asks_logprobs(self) -> list[bool]:
        """One flag a canvas."""
        return [canvas.asks_logprobs for canvas in self.records]

    @cached_property
    def steering(self) -> Steering | None:
        """None if Python has to look at the canvases in each step."""
        if self.length is not None or any(
            c.is_guided
            or not c.sampling.greedy
            or c.asks_logprobs
            or c.edits is not None
            or c.structure is not None
            for c in self.records
        ):
            return None
        with Guard(lambda error: None):
            first, *others = map(self.algorithm.captured_options, self.batch.options)
            if first is not None and all(options == first for options in others):
                return Steering(self.algorithm, self.cache, first)
        return None

    def select(self, rows: Sequence[int]) -> Group:
        """Some of the canvases."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.batch.device)
        return replace(
            self,
            batch=self.batch.select(rows, index),
            cache_state=self.cache_state.select(rows, index),
            windows=Windows(*(bound[index] for bound in self.windows)),
            measured=self.measured[index],
            reported=None,
            revealed=None,
        )

    def joined(self, other: Group) -> Group:
        """These canvases, then the others of the same key.

        Raises:
            TypeError: the algorithm's states do not fit each other.
        """
        pairs = zip(self.windows, other.windows, strict=True)
        return replace(
            self,
            changes_logits=self.changes_logits or other.changes_logits,
            batch=self.batch.joined(other.batch),
            cache_state=self.cache_state.joined(other.cache_state),
            windows=Windows(*map(torch.cat, pairs)),
            measured=torch.cat([self.measured, other.measured]),
            reported=None,
        )

    def tensors(self) -> list[torch.Tensor]:
        """All tensors ``(R, ...)``, in one order for all groups of the key."""
        state = self.cache_state.tensors().values()
        return [*self.batch.tensors(), *state, *self.windows]

    def move_to(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep the canvases in other tensors, in the order of ``tensors``."""
        rest = iter(tensors)
        self.batch = self.batch.with_tensors(rest)
        self.cache_state = self.cache_state.with_tensors(rest)
        self.windows = Windows(next(rest), next(rest))

    def report(self, table: torch.Tensor) -> None:
        """Note the table of a captured step."""
        self.reported = table

    def measure(self, inputs: StepInputs[Any, Any]) -> None:
        """Compute the statistics that the algorithm always reads.

        Changed logits are the algorithm's own, which it measures itself.
        """
        if inputs.num_candidates and not self.changes_logits:
            for statistic in self.statistics:
                inputs.logits.measure(statistic, self.batch.facts.mask_id)

    def decide(
        self, inputs: StepInputs[Any, Any], probes: Probes | None = None
    ) -> None:
        """Commit what the algorithm accepts, and choose the next step.

        The tensors are replaced by others; none is written to.

        Args:
            probes: what the length rule measures.
        """
        self.reported = None
        if inputs.num_candidates:
            decision = self.algorithm.decide(inputs)
            decision.check(inputs.num_candidates)
        else:  # every canvas is measured only
            decision = Decision(inputs.positions > 0, inputs.positions)
        accepted = accept_all(inputs, decision)
        if inputs.certain is not None:
            accepted = accepted | inputs.certain
        accepted, decision = without_words(inputs, accepted, decision)
        self.revealed = self._reveal(inputs, accepted, decision)
        if self.length is not None and probes is not None:
            self.measured = self.length.measure(inputs, probes, accepted)
        self.batch.commit(
            inputs.canvas_index, inputs.positions, accepted, decision.tokens
        )
        if inputs.num_candidates:
            self.algorithm.on_commit(inputs, accepted, decision)
        self.choose_next_step()

    def choose_next_step(self, commits: bool = True) -> None:
        """Ask the algorithm and the cache strategy for the next step.

        Args:
            commits: False if the next forward is only measured.
        """
        batch = self.batch
        step = self.algorithm.next_step(batch)
        step.check(len(batch), batch.max_answer_len)
        # After ``next_step``, which may fill the masks behind an EOS.
        batch.update_done()
        step = widen(batch, step)
        candidates = step.candidates & ~batch.rows.done[:, None]
        if not commits:
            batch.expect_measuring()
            candidates = torch.zeros_like(candidates)
        batch.set_step(Step(candidates, step.start, step.end))
        self.windows = self.cache.next_windows(batch, self.cache_state, step)

    def _reveal(
        self,
        inputs: StepInputs[Any, Any],
        accepted: torch.Tensor,
        decision: Decision,
    ) -> RevealTable | None:
        some = inputs.candidates_of(self.asks_logprobs)
        if some is None or not len(some):
            return None
        num_top = max(c.reveals.num_top if c.reveals else 0 for c in self.records)
        return RevealTable(inputs, decision, some, accepted, num_top)

    def take_revealed(self) -> torch.Tensor | None:
        """The rows of ``RevealTable`` of the last step, once. Waits for the device.

        None where the step committed nothing in a canvas that asks.
        """
        revealed, self.revealed = self.revealed, None
        return None if revealed is None else revealed.rows(self.batch)

    def table(self) -> torch.Tensor:
        """``(R, NUM_NUMBERS + M + A)`` int64: what the host learns of a step.

        The numbers of ``Progress``, the bits of ``measured``, and the answer, -1 where
        masked. The last A are the bits of ``Algorithm.scores``, where there are some.
        """
        rows, step = self.batch.rows, self.batch.step
        assert step is not None, "no step is chosen"
        numbers = (
            rows.num_forwards,
            rows.num_committed,
            rows.cut_short.long(),
            rows.done.long(),
            step.candidates.sum(dim=1),
            *self.windows,
            step.end,
        )
        answers = rows.ids.masked_fill(rows.masked, -1)
        parts = [torch.stack(numbers, dim=1), answers]
        if self.length is not None:
            parts.insert(1, self.measured.view(torch.int64))
        scores = self.algorithm.scores(self.batch)
        if scores is not None:
            parts.append(scores.view(torch.int64))
        return torch.cat(parts, dim=1)

    def finish(self) -> None:
        """Commit every mask, so that no step changes the canvases any more."""
        batch = self.batch
        batch.fill(batch.rows.masked, batch.rows.ids[:, :1])
        self.choose_next_step()

    def expect_full_windows(self) -> None:
        """The keys and values in the pool are lost: the next windows are full."""
        self.windows = whole_canvases(self.batch)
        for canvas in self.records:
            canvas.expect_full_window()

    def guard(self, agree: Agree) -> Guard:
        """Let an error of the algorithm end the group's requests and no others."""
        return Guard(self._fail, agree)

    def _fail(self, error: Exception) -> None:
        logger.error("%s failed", self.algorithm.name, exc_info=error)
        for canvas in self.records:
            canvas.fail(f"{self.algorithm.name}: {message_of(error)}")
