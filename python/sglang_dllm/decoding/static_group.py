"""A denoising step over tensors that stay where they are, as a CUDA graph needs it.

The step is one function of tensors: the tokens of the windows, the forward, the
decision, the commit, the next candidates and windows. It reads and writes the tensors
of ``StaticGroup`` and nothing else that changes, so a capture of it runs every later
step too. The algorithms need no second form: the function runs their methods once, over
canvases that stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.tensor_rows import indices
from sglang_dllm.decoding.window import DUMMY_SLOT
from sglang_dllm.models.facts import ModelFacts


class StepShape(NamedTuple):
    """The size of a captured step: R canvases, windows of L tokens, N candidates."""

    num_canvases: int
    length: int
    num_candidates: int


@dataclass(frozen=True)
class StepTokens:
    """The inputs of the forward of R windows of L tokens. A short window repeats its
    last token.

    Attributes:
        num_windows: R.
        ids, positions: ``(R * L,)`` int64.
        kv_slots: ``(R * L,)`` int64: where keys and values go; ``DUMMY_SLOT`` for
            padding.
        logits_indices: ``(N,)`` int64: the tokens that predict the candidates.
    """

    num_windows: int
    ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    logits_indices: torch.Tensor


Forward = Callable[[StepTokens], Logits]
"""From the tokens of the windows to the logits ``(N, V)`` of the candidates."""


class StaticGroup:
    """Fixed tensors for up to R canvases of one steering.

    Row 0 is a sink: a canvas at its first step, which it never gets beyond. Surplus
    candidates of a step belong to it. Then come the canvases of the group, then
    fillers, which are done.

    Attributes:
        steering: of the groups that fit.
        num_canvases, answer_len, canvas_len: the most canvases, and the most tokens of
            an answer and of a canvas.
        tenant: the group whose tensors are here; None before the first one.
    """

    def __init__(
        self,
        decoding: Decoding,
        facts: ModelFacts,
        device: torch.device,
        *,
        num_canvases: int,
        answer_len: int,
        canvas_len: int,
    ) -> None:
        """
        Args:
            decoding: not finalized. Its options say how wide the algorithm's tensors
                are; a group whose tensors are wider does not fit.

        Raises:
            ValueError: a step with these options cannot be captured.
            Exception: whatever the algorithm raises.
        """
        self.num_canvases, self.answer_len = num_canvases, answer_len
        self.canvas_len, self._facts = canvas_len, facts
        widest = _group_of(decoding, answer_len, facts, device)
        if widest.steering is None:
            raise ValueError(f"no step of {widest.algorithm.name} can be captured")
        self.steering = widest.steering
        self._sink = _group_of(decoding, 1, facts, device)
        filler = _group_of(decoding, 1, facts, device)
        filler.finish()
        rows = zip(
            self._sink.tensors(), filler.tensors(), widest.tensors(), strict=True
        )
        self._blank = [
            _blank(sink, one, num_canvases, wide.shape[1:]) for sink, one, wide in rows
        ]
        self._tensors = [tensor.clone() for tensor in self._blank]
        shape = num_canvases, canvas_len
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        self._prompts, self._kv_slots = zeros, zeros.clone()
        self._table = self._over(num_canvases).table()[1:].clone()
        self.tenant: Group | None = None
        self._views: list[torch.Tensor] = []

    def accepts(self, group: Group) -> bool:
        """True if ``load`` may take a group."""
        return group is self.tenant or (
            group.steering == self.steering
            and len(group.records) <= self.num_canvases
            and all(len(canvas) <= self.canvas_len for canvas in group.records)
            and all(
                max_size >= size
                for fixed, tensor in zip(self._tensors, group.tensors(), strict=True)
                for max_size, size in zip(
                    fixed.shape[1:], tensor.shape[1:], strict=True
                )
            )
        )

    def load(self, group: Group) -> None:
        """Keep a group's tensors here from now on.

        Nothing is copied if the last step of these canvases was captured too. After
        another step, what that step replaced is copied.
        """
        if self.tenant is not group:
            self.tenant = None
            _write(self._tensors, self._blank)
            for fixed in self._tensors:
                # A group may be narrower than the filler: behind it are zeros, as in
                # a batch.
                fixed[1 : 1 + len(group.records)].zero_()
            self._place(group.records)
            self._views = [
                fixed[1:][tuple(map(slice, tensor.shape))]
                for fixed, tensor in zip(self._tensors, group.tensors(), strict=True)
            ]
            self.tenant = group
        changed = [
            (fixed, tensor)
            for fixed, tensor in zip(self._views, group.tensors(), strict=True)
            if tensor is not fixed
        ]
        if changed:
            _write(*zip(*changed, strict=True))
            group.move_to(self._views)

    def report(self, group: Group) -> None:
        """Give the loaded group the table of the step that was launched."""
        assert group is self.tenant, "the group is not loaded"
        group.report(self._table[: len(group.records)])

    def step(self, shape: StepShape, forward: Forward) -> None:
        """One step of the loaded canvases; with none loaded, of fillers.

        Runs in a capture: it waits for nothing, and Python does not see a canvas.

        Args:
            shape: R at least the loaded canvases, L their longest window, N all their
                candidates.
        """
        num = shape.num_canvases
        group = self._over(num)
        before = group.tensors()
        canvas_index, positions = _candidates(group, shape)
        tokens = self._tokens(group, shape, canvas_index, positions)
        assert group.batch.step is not None
        inputs: StepInputs[Any, Any] = StepInputs(
            batch=group.batch,
            step=group.batch.step,
            canvas_index=canvas_index,
            positions=positions,
            counts=(),
            logits=forward(tokens),
        )
        group.measure(inputs)
        group.decide(inputs)
        self._table[:num].copy_(group.table()[1:])
        changed = [
            (old[1:], new[1:])
            for old, new in zip(before, group.tensors(), strict=True)
            if new is not old
        ]
        _write(*zip(*changed, strict=True))

    def _over(self, num_canvases: int) -> Group:
        """A group of the fixed tensors of the sink and so many canvases."""
        num_rows, sink = num_canvases + 1, self._sink
        batch = replace(
            sink.batch,
            records=sink.records * num_rows,
            options=[self.steering.options] * num_rows,
        )
        group = replace(sink, batch=batch)
        group.move_to(tensor[:num_rows] for tensor in self._tensors)
        return group

    def _place(self, records: Sequence[Canvas]) -> None:
        """Write the prompts and the KV slots of canvases; fillers have none."""
        longest = max(canvas.prompt_len for canvas in records)
        prompts = np.zeros((len(records), longest), dtype=np.int64)
        for prompt, canvas in zip(prompts, records, strict=True):
            prompt[: canvas.prompt_len] = canvas.ids[: canvas.prompt_len]
        there = self._prompts[: len(records), :longest]
        there.copy_(torch.from_numpy(prompts), non_blocking=True)
        self._kv_slots.fill_(DUMMY_SLOT)
        for slots, canvas in zip(self._kv_slots, records, strict=False):
            if canvas.kv_slots is not None:
                slots[: len(canvas)] = canvas.kv_slots

    def _tokens(
        self,
        group: Group,
        shape: StepShape,
        canvas_index: torch.Tensor,
        positions: torch.Tensor,
    ) -> StepTokens:
        """The tokens of the windows, and the ones that predict N candidates."""
        num, length, _ = shape
        rows, device = group.batch.rows, group.batch.device
        start, end = (bound[1:, None] for bound in group.windows)
        prompt_len = rows.prompt_len[1:, None]
        place = start + indices(length, device)
        at = torch.minimum(place, end - 1).clamp(0, self.canvas_len - 1)
        answer_at = at - prompt_len
        ids = torch.where(
            answer_at < 0,
            self._prompts[:num].gather(1, at),
            rows.ids[1:].gather(1, answer_at.clamp(0, self.answer_len - 1)),
        )
        kv_slots = self._kv_slots[:num].gather(1, at)
        kv_slots = kv_slots.masked_fill(place >= end, DUMMY_SLOT)
        # The sink has no window; its candidates read the first canvas's.
        window = (canvas_index - 1).clamp(min=0)
        shift = group.batch.facts.family.shift
        predicts = (prompt_len - shift - start)[window, 0] + positions
        last = (end - start)[window, 0] - 1
        predicts = torch.minimum(predicts, last).clamp(0, length - 1)
        return StepTokens(
            num,
            ids.flatten(),
            at.flatten(),
            kv_slots.flatten(),
            window * length + predicts,
        )


def _candidates(group: Group, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The canvas and the position of N candidates, the sink's first."""
    assert group.batch.step is not None, "no step is chosen"
    candidates, num = group.batch.step.candidates[1:], shape.num_candidates
    found = torch.nonzero_static(candidates, size=num)
    # The surplus is at the end; as the sink's it has to be in front.
    at = indices(num, candidates.device) - (num - candidates.sum())
    canvas_index, positions = found[at.clamp(min=0)].unbind(dim=1)
    is_surplus = at < 0
    return (
        (canvas_index + 1).masked_fill(is_surplus, 0),
        positions.masked_fill(is_surplus, 0),
    )


def _group_of(
    decoding: Decoding, answer_len: int, facts: ModelFacts, device: torch.device
) -> Group:
    """A canvas of masks that stands for any other one.

    It ends at an EOS. So the capture has the operations for canvases that do; they
    change nothing of the others.
    """
    final = decoding.finalized(answer_len, facts)
    canvas = final.new_canvas((), answer_len, facts, ends_at_eos=True)
    return Group.of(canvas, final, facts, device)


def _blank(
    sink: torch.Tensor, filler: torch.Tensor, num_fillers: int, sizes: torch.Size
) -> torch.Tensor:
    """``(1 + num_fillers, *sizes)``: rows ``(1, ...)``, padded with zeros."""
    out = sink.new_zeros((1 + num_fillers, *sizes))
    inside = out[(slice(None), *map(slice, sink.shape[1:]))]
    inside[:1] = sink
    inside[1:] = filler
    return out


def _write(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy values to targets. A value may be a view of a target that is written before
    the value is read."""
    storages = {target.untyped_storage().data_ptr() for target in targets}
    fresh = [
        value.clone() if value.untyped_storage().data_ptr() in storages else value
        for value in values
    ]
    for target, value in zip(targets, fresh, strict=True):
        target.copy_(value)
