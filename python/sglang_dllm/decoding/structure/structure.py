"""Canvases whose answers must have a form: their edit, and their proposals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_dllm.decoding.sampling import Stream, counter_uniform, filter_logits
from sglang_dllm.decoding.statistics import DRAW_ELEMENTS, row_chunks
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import Part, Programme

if TYPE_CHECKING:
    from sglang_dllm.decoding.canvas import Canvas
    from sglang_dllm.decoding.decision import StepInputs
    from sglang_dllm.decoding.logits import Candidates, Logits

WORST = -1e6
"""The least score of a token. Nothing that forbids a token makes an answer invalid."""


@dataclass(frozen=True, eq=False)
class Structure:
    """The form of one answer."""

    automaton: TokenAutomaton

    def part(self, canvas: Canvas) -> Part:
        """The automaton for the part of a canvas that is decoded."""
        before = canvas.ids[canvas.answer_start : canvas.prompt_len].tolist()
        state = self.automaton.follow(self.automaton.start, before)
        length = canvas.answer_len
        cap = length if canvas.length is None else canvas.length.cap - len(before)
        start = self.automaton.end if state is None else state
        return Part(self.automaton, start, length, max(0, cap - length))

    def is_kept(self, canvas: Canvas) -> bool:
        """True if the answer of a canvas that is done has the form.

        Masks behind an EOS are no part of it.
        """
        answer = canvas.ids[canvas.answer_start :]
        (ends,) = np.isin(answer, canvas.eos_ids).nonzero()
        end = int(ends[0]) if len(ends) else len(answer)
        return self.automaton.takes(answer[:end].tolist())


class Structured:
    """The K candidates of structured canvases in one step.

    Attributes:
        candidates: ``(K,)`` int64: which of the N candidates.
        certain: ``(N,)`` bool: at these, every valid answer has the same token.
    """

    def __init__(self, inputs: StepInputs[Any, Any], candidates: torch.Tensor) -> None:
        batch = inputs.batch
        self._inputs, self.candidates = inputs, candidates
        self._programme, self._row_of = batch.memo(
            "structure", lambda: _programme(batch.records, batch.device)
        )
        num = self._programme.num_positions
        self._part = self._row_of[inputs.canvas_index[candidates]]
        self._at = inputs.positions[candidates]
        is_part = self._row_of >= 0
        rows = is_part.nonzero_static(size=self._programme.num_parts)[:, 0]
        self._ids = batch.rows.ids[rows][:, :num]
        self._masked = batch.rows.masked[rows][:, :num]
        self._open = self._programme.open_classes(self._ids, self._masked)
        possible = self._programme.possible(self._open)
        offset = self._programme.first_class[self._part]
        self._offset = offset
        self._possible = possible[self._at]
        position = torch.full_like(inputs.positions, -1)
        ordinal = torch.arange(len(candidates), device=candidates.device)
        self._place = position.index_put((candidates,), ordinal)
        num_tokens = torch.cat(
            [self._allowed(ordinal[rows]).sum(dim=1) for rows in self._chunks()]
        )
        # Several tokens may be an EOS. They are one class.
        of_eos = self._programme.token_class[self._part, inputs.facts.eos_ids[0]]
        ends = self._possible.gather(1, (of_eos + offset)[:, None])[:, 0]
        is_certain = (num_tokens == 1) | (ends & (self._possible.sum(dim=1) == 1))
        certain = torch.zeros_like(inputs.positions, dtype=torch.bool)
        self.certain = certain.index_put((candidates,), is_certain)

    def _chunks(self) -> list[slice]:
        size = self._inputs.facts.vocab_size
        return list(row_chunks(len(self.candidates), size, DRAW_ELEMENTS))

    def _allowed(self, which: torch.Tensor) -> torch.Tensor:
        """``(n, V)`` bool: the tokens that some valid answer has."""
        of = self._programme.token_class[self._part[which]]
        return self._possible[which].gather(1, of + self._offset[which, None])

    def edit(self, logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        """Tokens that no valid answer has get minus infinity."""
        place = self._place[some]
        is_free = (place < 0)[:, None]
        return logits.masked_fill(
            ~(self._allowed(place.clamp(min=0)) | is_free), -torch.inf
        )

    def tokens(self, logits: Logits) -> torch.Tensor:
        """``(K,)`` int64: the most probable valid answer, at the candidates.

        Noise is added to the logits of a canvas with a temperature first. That draws
        from the joint distribution approximately (perturb and MAP), and exactly where
        one candidate is left.
        """
        programme, size = self._programme, self._inputs.facts.vocab_size
        device = self._at.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        scores = torch.where(self._open, zero, -torch.inf)
        some_class = torch.arange(programme.width, device=device)
        best_tokens = []
        for rows in self._chunks():
            score = self._scores(logits(self.candidates[rows]), rows)
            of = programme.token_class[self._part[rows]]
            shape = (len(of), programme.width)
            best = score.new_full(shape, -torch.inf)
            best = best.scatter_reduce(1, of, score, "amax")
            token = torch.arange(size, device=device).expand_as(of)
            token = torch.where(score == best.gather(1, of), token, size)
            first = torch.full(shape, size, device=device)
            best_tokens.append(first.scatter_reduce(1, of, token, "amin"))
            at, part = self._at[rows], self._part[rows]
            is_new = (best > -torch.inf) & self._masked[part, at][:, None]
            place = (self._offset[rows, None] + some_class).clamp(
                max=programme.num_classes - 1
            )
            # A narrow part adds 0 to classes of others.
            value = torch.where(is_new, best, 0.0)
            scores = scores.index_put((at[:, None].expand(shape), place), value, True)
        classes = programme.best_classes(scores)[self._part, self._at]
        found = torch.cat(best_tokens).gather(1, classes[:, None])[:, 0]
        there = self._ids[self._part, self._at]
        is_masked = self._masked[self._part, self._at] & (found < size)
        return torch.where(is_masked, found, there)

    def _scores(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """``(n, V)`` float64: not below ``WORST``, 0 for the best token."""
        inputs, some = self._inputs, self.candidates[rows]
        mask_id = inputs.facts.mask_id
        score = logits.double().nan_to_num(nan=-torch.inf)
        score = score.index_fill(1, _index(mask_id, score.device), -torch.inf)
        records = inputs.batch.records
        if not all(canvas.sampling.greedy for canvas in records if canvas.structure):
            sampling = inputs.batch.sampling
            heat, top_p, top_k, min_p, seed, step = (
                inputs.per_candidate(values)[some]
                for values in (
                    *(sampling.temperature, sampling.top_p, sampling.top_k),
                    *(sampling.min_p, sampling.seed, inputs.batch.rows.num_forwards),
                )
            )
            is_drawn = heat > 0
            scaled = score / torch.where(is_drawn, heat, 1.0)[:, None]
            scaled = filter_logits(scaled, top_p, top_k, min_p)
            size = score.shape[1]
            token = torch.arange(size, device=score.device)
            place = self._at[rows, None] * size + token
            uniform = counter_uniform(
                seed[:, None], step[:, None], place, Stream.STRUCTURE
            )
            noise = -(-uniform.clamp(min=2.0**-54).log()).log()
            score = torch.where(is_drawn[:, None], scaled + noise, score)
        best = score.amax(dim=1, keepdim=True)
        best = torch.where(best.isfinite(), best, 0.0)
        return (score - best).clamp(min=WORST)


def structured(inputs: StepInputs[Any, Any]) -> Structured | None:
    """The candidates of canvases with a form; None where there are none."""
    records = inputs.batch.records
    some = inputs.candidates_of([canvas.structure is not None for canvas in records])
    return None if some is None or not len(some) else Structured(inputs, some)


def _index(value: int, device: torch.device) -> torch.Tensor:
    return torch.full((1,), value, device=device)


def _programme(
    records: list[Canvas], device: torch.device
) -> tuple[Programme, torch.Tensor]:
    """The programme of structured canvases, and the part ``(R,)`` of each canvas."""
    parts: list[Part] = []
    row_of = []
    for canvas in records:
        row_of.append(-1 if canvas.structure is None else len(parts))
        if canvas.structure is not None:
            parts.append(canvas.structure.part(canvas))
    index = torch.tensor(row_of).to(device, non_blocking=True)
    return Programme(parts, device), index
