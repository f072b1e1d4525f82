"""Denoising steps of a mixed batch: what to compute, then what to commit.

The denoiser holds the canvases of all requests on the device, in groups of one
algorithm and one cache strategy. It chooses the next step when it commits a step, so
that one transfer tells the host both what was committed and what comes next. Only
``sync`` waits for the device, and a commit of canvases with a form (``structure``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from sglang_dllm.decoding.agreement import Agree, alone
from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.decoding.canvas_batch import Device
from sglang_dllm.decoding.edits import edited
from sglang_dllm.decoding.group import NUM_NUMBERS, Group, GroupKey
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.progress import Progress
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.reveals import Revealed
from sglang_dllm.models.facts import ModelFacts

MAX_FORWARDS = 100_000
"""The most forwards of one request, and the most steps that any option asks for."""


class Denoiser:
    """All canvases that are being decoded. The scheduler's thread is the only user.

    A denoising step is ``pack``, a forward, ``commit``, then ``join`` for the canvases
    that arrived during the forward, and ``sync``. Between ``pack`` and ``commit`` no
    canvas may join or leave: the packed forward was made of them. A captured step of
    the ``only_group`` takes the place of ``pack`` and the forward; it commits on the
    device, and ``commit_captured`` does the host's part.
    """

    def __init__(
        self, facts: ModelFacts, device: Device = "cpu", agree: Agree = alone
    ) -> None:
        """
        Args:
            agree: of the ranks that decode these canvases.
        """
        self.facts, self.agree = facts, agree
        self.device = torch.device(device)
        self._groups: dict[GroupKey, Group] = {}
        self._packed: PackedForward | None = None

    @property
    def canvases(self) -> list[Canvas]:
        """In the order of a forward's windows."""
        return [c for group in self._groups.values() for c in group.records]

    def prepare(self, canvas: Canvas, decoding: Decoding) -> Group:
        """A canvas with nothing decoded and its first step, ready to ``join``.

        Does not wait for the device, so that a forward may be in flight.

        Args:
            decoding: the result of ``Decoding.finalized``.

        Raises:
            Exception: whatever the algorithm raises.
        """
        return Group.of(canvas, decoding, self.facts, self.device)

    def join(self, group: Group) -> None:
        """Take a prepared or parked canvas in. ``sync`` tells the host its window.

        A canvas whose state does not fit the others of its group fails.
        """
        there = self._groups.get(group.key)
        with group.guard(self.agree):
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

    def fail(self, message: str) -> None:
        """Fail and forget all canvases. A forward that was packed is not committed."""
        for canvas in self.canvases:
            canvas.fail(message)
        self._groups, self._packed = {}, None

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
            probed = [group.length is not None for group in self._groups.values()]
            self._packed = PackedForward.of(batches, probed, self.device)
        self._packed.update(batches)
        return self._packed

    def commit(self, logits: Logits) -> None:
        """Commit one step of every canvas, and choose the next step.

        Args:
            logits: ``(N + U + P, V)``: of the tokens ``pack().logits_indices``.
        """
        assert self._packed is not None, "no forward was packed"
        packed, groups = self._packed, list(self._groups.values())
        for index, group in enumerate(groups):
            for canvas in group.records:
                canvas.count_forward()
            inputs = edited(packed.inputs_of(index, group.batch, logits))
            probes = packed.probes_of(index, logits)
            group.measure(inputs)
            with group.guard(self.agree) as guard:
                group.decide(inputs, probes)
            if guard.caught:
                self.remove(group.records)

    def only_group(self) -> Group | None:
        """All canvases, if one algorithm and one cache strategy decode them."""
        groups = list(self._groups.values())
        return groups[0] if len(groups) == 1 else None

    def commit_captured(self) -> None:
        """Count a step of the only group that committed itself on the device."""
        for canvas in self.canvases:
            canvas.count_forward()

    def sync(self) -> None:
        """Wait for the last commit, and update the ``Canvas`` records.

        One transfer brings a table of each group: its answers, -1 where masked, and
        the numbers of ``Progress``. A group with canvases that ask for
        log-probabilities has a second one, whose size the device knows alone.
        """
        groups = list(self._groups.values())
        if not groups:
            return
        tables = [
            group.table() if group.reported is None else group.reported
            for group in groups
        ]
        revealed = [group.take_revealed() for group in groups]
        sent = [table for table in (*tables, *revealed) if table is not None]
        flat = [table.flatten() for table in sent]
        host = (torch.cat(flat) if flat[1:] else flat[0]).cpu().numpy()
        found = _split(host, (*tables, *revealed))
        for group, rows, reveals in zip(
            groups, found[: len(groups)], found[len(groups) :], strict=True
        ):
            assert rows is not None
            self._update(group, rows, reveals)

    def _update(self, group: Group, rows: IdArray, revealed: IdArray | None) -> None:
        """Give each canvas of a group its row of the table, and what it asks for."""
        first_id = NUM_NUMBERS + group.num_measured
        for index, canvas in enumerate(group.records):
            numbers, measured, answer = np.split(rows[index], [NUM_NUMBERS, first_id])
            answer = answer[: canvas.answer_len]
            canvas.update(
                answer,
                _progress(*numbers.tolist()),
                measured.view(np.float64).tolist(),
                None if revealed is None else Revealed.of_canvas(index, revealed),
            )
            if canvas.scored is not None:
                bits = rows[index, rows.shape[1] - group.batch.max_answer_len :]
                canvas.scored.note(bits[: canvas.answer_len].view(np.float64))
            self._check(canvas, answer)

    def _check(self, canvas: Canvas, answer: IdArray) -> None:
        """Fail a canvas that an algorithm from outside led astray.

        A window that is none would shift the tokens of all other requests, and a token
        outside the vocabulary would end the process in the embedding.
        """
        start, end = canvas.window
        if ((answer < -1) | (answer >= self.facts.vocab_size)).any():
            canvas.fail("the algorithm committed a token outside the vocabulary")
        elif canvas.done:
            form = canvas.structure
            if form and not canvas.resize and not form.is_kept(canvas):
                canvas.fail("the answer does not have the form that was asked for")
        elif not 0 <= start < end <= len(canvas):
            canvas.fail(f"the algorithm decodes no window: {start} to {end}")
        elif canvas.num_forwards >= MAX_FORWARDS:
            canvas.fail(f"no end after {MAX_FORWARDS} forwards")


def _split(
    numbers: IdArray, tables: Iterable[torch.Tensor | None]
) -> list[IdArray | None]:
    """The tables that were sent back to back, in their shapes."""
    found: list[IdArray | None] = []
    first = 0
    for table in tables:
        if table is None:
            found.append(None)
        else:
            end = first + table.numel()
            found.append(numbers[first:end].reshape(table.shape))
            first = end
    return found


def _progress(
    num_forwards: int,
    num_committed: int,
    cut_short: int,
    done: int,
    num_candidates: int,
    start: int,
    end: int,
    span_end: int,
) -> Progress:
    return Progress(
        num_forwards,
        num_committed,
        bool(cut_short),
        bool(done),
        num_candidates,
        (start, end),
        span_end,
    )
