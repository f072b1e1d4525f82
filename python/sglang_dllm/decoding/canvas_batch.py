"""The canvases that one algorithm decodes together, as tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeAlias, TypeVar

import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.selection import count
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import (
    TensorRows,
    first_true,
    indices,
    narrowed,
    stacked,
)
from sglang_dllm.models.facts import ModelFacts

Device: TypeAlias = torch.device | str
OptionsT = TypeVar("OptionsT", bound=Options)
StateT = TypeVar("StateT", bound=TensorRows)

NO_LIMIT = 1 << 62
"""``max_forwards`` of a canvas without one."""


@dataclass
class SamplingRows(TensorRows):
    """The ``SamplingOptions`` of each canvas, ``(R,)``."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor


@dataclass
class CanvasRows(TensorRows):
    """The tensors of the denoiser.

    Attributes:
        ids: ``(R, A)`` int64: the answers; the mask token where ``masked``.
        masked: ``(R, A)`` bool: not committed. False behind a shorter answer.
        began_masked: ``(R, A)`` bool: ``masked`` before the first step.
        prompt_len, answer_len, max_forwards: ``(R,)`` int64.
        ends_at_eos: ``(R,)`` bool.
        ends_from: ``(R,)`` int64: where an EOS ends the answer.
        num_forwards, num_committed: ``(R,)`` int64, as in ``Canvas``.
        cut_short, done: ``(R,)`` bool, likewise.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    began_masked: torch.Tensor
    prompt_len: torch.Tensor
    answer_len: torch.Tensor
    max_forwards: torch.Tensor
    ends_at_eos: torch.Tensor
    ends_from: torch.Tensor
    num_forwards: torch.Tensor
    num_committed: torch.Tensor
    cut_short: torch.Tensor
    done: torch.Tensor


@dataclass
class CanvasBatch(Generic[OptionsT, StateT]):
    """R canvases whose answers are at most A tokens long.

    Positions count from the start of the answer. Row ``i`` of every tensor belongs to
    canvas ``i``.

    Attributes:
        records: the canvases as the host knows them.
        options: of each canvas.
        rows, sampling: the tensors of the denoiser.
        state: the tensors of the algorithm.
        step: of the next forward.
    """

    facts: ModelFacts
    records: list[Canvas]
    options: list[OptionsT]
    rows: CanvasRows
    sampling: SamplingRows
    state: StateT
    step: Step | None = None
    _memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, canvas: Canvas, options: OptionsT, facts: ModelFacts, device: Device
    ) -> CanvasBatch[OptionsT, Any]:
        """One canvas as it is. Its algorithm has no state yet."""
        length, most = canvas.answer_len, options.max_forwards
        ids, masked = _answer_of(canvas, device)
        rows = CanvasRows(
            ids=ids,
            masked=masked,
            began_masked=masked,
            prompt_len=one_row(canvas.prompt_len, device),
            answer_len=one_row(length, device),
            max_forwards=one_row(NO_LIMIT if most is None else most, device),
            ends_at_eos=one_row(canvas.ends_at_eos, device),
            ends_from=one_row(canvas.ends_from, device),
            num_forwards=one_row(canvas.num_forwards, device),
            num_committed=one_row(canvas.num_committed, device),
            cut_short=one_row(canvas.cut_short, device),
            done=one_row(False, device),
        )
        sampling = SamplingRows(
            temperature=one_row(float(canvas.sampling.temperature), device),
            top_p=one_row(float(canvas.sampling.top_p), device),
            top_k=one_row(canvas.sampling.top_k, device),
            min_p=one_row(float(canvas.sampling.min_p), device),
            seed=one_row(canvas.sampling.seed, device),
        )
        return CanvasBatch(
            facts, [canvas], [options], rows, sampling, state=TensorRows()
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def device(self) -> torch.device:
        return self.rows.ids.device

    @property
    def max_answer_len(self) -> int:
        """A."""
        return self.rows.ids.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """``(A,)`` int64: 0 to A - 1."""
        return indices(self.max_answer_len, self.device)

    @property
    def inside(self) -> torch.Tensor:
        """``(R, A)`` bool: whether a position is one of the answer's."""
        inside: torch.Tensor = self.memo(
            "inside", lambda: self.positions < self.rows.answer_len[:, None]
        )
        return inside

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value that stays valid until a canvas joins or leaves."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def one_row(self, value: float | bool) -> torch.Tensor:
        """``(1,)`` on the device; bool, int64 or float64 by the value's type."""
        return one_row(value, self.device)

    def first_masked(self) -> torch.Tensor:
        """``(R,)`` int64: the first position not committed, A where there is none."""
        return first_true(self.rows.masked)

    def first_eos(self) -> torch.Tensor:
        """``(R,)`` int64: the first committed EOS that ends the answer, A for none."""
        found = torch.zeros_like(self.inside)
        for eos in self.facts.eos_ids:
            found |= self.rows.ids == eos
        # A masked position holds the mask token, which is no EOS.
        may_end: torch.Tensor = self.memo("may end", self._may_end)
        return first_true(found & may_end)

    def _may_end(self) -> torch.Tensor:
        """``(R, A)`` bool: whether an EOS there would end the answer."""
        rows, end = self.rows, self.rows.answer_len
        padding = [canvas.num_padding for canvas in self.records]
        if any(padding):
            end = end - torch.tensor(padding).to(self.device, non_blocking=True)
        behind = self.positions >= rows.ends_from[:, None]
        return behind & (self.positions < end[:, None])

    def fill(self, where: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write tokens that no forward decided, for example behind an EOS.

        Args:
            where: ``(R, A)`` bool.
            tokens: ``(R, 1)`` int64: the token of each canvas; or ``(R, A)``.
        """
        self.rows.ids = torch.where(where, tokens, self.rows.ids)
        self.rows.masked = self.rows.masked & ~where

    def show(self, masked: torch.Tensor, tokens: torch.Tensor) -> None:
        """Replace the answers by given tokens under other masks.

        Args:
            masked: ``(R, A)`` bool; False behind a shorter answer.
            tokens: ``(R, A)`` int64.
        """
        self.rows.ids = tokens.masked_fill(masked, self.facts.mask_id)
        self.rows.masked = masked

    def commit(
        self,
        canvas_index: torch.Tensor,
        positions: torch.Tensor,
        accepted: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Take over the accepted ones of N candidates, and count the forward.

        Args:
            canvas_index, positions, tokens: ``(N,)`` int64.
            accepted: ``(N,)`` bool.
        """
        rows = self.rows
        were_masked = rows.masked[canvas_index, positions]
        new = count(accepted & were_masked, canvas_index, len(self))
        rows.num_committed = rows.num_committed + new
        at = canvas_index, positions
        rows.ids = rows.ids.index_put(at, torch.where(accepted, tokens, rows.ids[at]))
        rows.masked = rows.masked.index_put(at, were_masked & ~accepted)
        rows.num_forwards = rows.num_forwards + ~rows.done

    def note_cut_short(self, cut_short: torch.Tensor) -> None:
        """``(R,)`` bool: canvases of which ``max_forwards`` forced a commit."""
        self.rows.cut_short = self.rows.cut_short | cut_short

    def update_done(self) -> None:
        """Find out which canvases need no forward any more."""
        first_masked = self.first_masked()
        done = first_masked == self.max_answer_len
        if any(canvas.ends_at_eos for canvas in self.records):
            done |= (self.first_eos() < first_masked) & self.rows.ends_at_eos
        self.rows.done = done

    def expect_measuring(self) -> None:
        """Let a forward run that commits nothing, also over a canvas without masks."""
        self.rows.done = torch.zeros_like(self.rows.done)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors ``(R, ...)``, in one order for all batches of an algorithm."""
        assert self.step is not None, "no step is chosen"
        parts = (self.rows, self.sampling, self.state)
        found = [tensor for part in parts for tensor in part.tensors().values()]
        return [*found, self.step.candidates, self.step.start, self.step.end]

    def with_tensors(self, rest: Iterator[torch.Tensor]) -> Self:
        """The same canvases in the next tensors, in the order of ``tensors``."""
        return type(self)(
            self.facts,
            self.records,
            self.options,
            self.rows.with_tensors(rest),
            self.sampling.with_tensors(rest),
            self.state.with_tensors(rest),
            Step(next(rest), next(rest), next(rest)),
        )

    def set_step(self, step: Step) -> None:
        """Store the candidates and the span of the next step."""
        self.step = step

    def start(self, state: StateT) -> None:
        """Take over the algorithm's tensors for canvases with nothing decoded."""
        self.state = state

    def select(self, rows: Sequence[int], index: torch.Tensor) -> Self:
        """Some of the canvases; ``index`` is ``rows`` on the device."""
        selected = type(self)(
            self.facts,
            [self.records[row] for row in rows],
            [self.options[row] for row in rows],
            self.rows.select(rows, index),
            self.sampling.select(rows, index),
            self.state.select(rows, index),
        )
        if self.step is not None:
            width = torch.Size([selected.max_answer_len])
            candidates = narrowed(self.step.candidates[index], [width])
            start, end = self.step.start[index], self.step.end[index]
            selected.step = Step(candidates, start, end)
        return selected

    def joined(self, other: Self) -> Self:
        """These canvases, then the others; shorter answers are padded.

        Raises:
            TypeError: the algorithm's states do not fit each other.
        """
        step = None
        if self.step is not None and other.step is not None:
            step = Step(
                stacked(self.step.candidates, other.step.candidates),
                torch.cat([self.step.start, other.step.start]),
                torch.cat([self.step.end, other.step.end]),
            )
        return type(self)(
            self.facts,
            self.records + other.records,
            self.options + other.options,
            self.rows.joined(other.rows),
            self.sampling.joined(other.sampling),
            self.state.joined(other.state),
            step,
        )


def _answer_of(canvas: Canvas, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(1, A)`` int64 and bool: the ids of a canvas's answer, and what is masked."""
    shape, start = (1, canvas.answer_len), canvas.prompt_len
    masked = canvas.masked[start:]
    if masked.all():
        return (
            torch.full(shape, canvas.mask_id, device=device),
            torch.ones(shape, dtype=torch.bool, device=device),
        )
    ids, is_masked = (
        torch.from_numpy(values[None]).to(device, non_blocking=True, copy=True)
        for values in (canvas.ids[start:], masked)
    )
    return ids, is_masked


def one_row(value: float | bool, device: Device) -> torch.Tensor:
    """``(1,)``: bool, int64 or float64 by the value's type.

    The device fills it. An upload would wait for a forward in flight.
    """
    dtype = (
        torch.bool
        if isinstance(value, bool)
        else torch.int64
        if isinstance(value, int)
        else torch.float64
    )
    return torch.full((1,), value, dtype=dtype, device=device)
