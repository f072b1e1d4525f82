"""Canvases whose answers must have a form: their edit, and their proposals."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_dllm.decoding.sampling import Stream, counter_uniform, filter_logits
from sglang_dllm.decoding.statistics import (
    DRAW_ELEMENTS,
    fits_at_once,
    row_chunks,
    without_token,
)
from sglang_dllm.decoding.structure.arcs import Ints
from sglang_dllm.decoding.structure.automaton import TokenAutomaton
from sglang_dllm.decoding.structure.programme import Programme, Strip

if TYPE_CHECKING:
    from sglang_dllm.decoding.canvas import Canvas
    from sglang_dllm.decoding.decision import StepInputs
    from sglang_dllm.decoding.logits import Candidates, LogitsOf

MAX_KNOWN = 64
"""Positions that are looked at before the first forward. The programme over all of a
long canvas would keep other requests waiting."""

WORST = -1e6
"""The least score of a token. Nothing that forbids a token makes an answer invalid."""

TIE = 1e-9
"""The class of the best token gets this more: the first of equal ones wins, as it does
without a form."""

SURE = 0.5
"""A token with this probability is more probable than all others together."""


@dataclass(eq=False)
class _Prefix:
    """The states behind the tokens of a committed prefix.

    It is found by the tokens alone, so it stays right whatever became of the canvas.
    """

    tokens: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    states: list[int | None] = field(default_factory=list)

    def follow(self, automaton: TokenAutomaton, tokens: Ints) -> int | None:
        """The state behind tokens ``(n,)``."""
        num = min(len(tokens), len(self.tokens))
        differs = self.tokens[:num] != tokens[:num]
        if differs.any():
            num = int(differs.argmax())
        states = self.states[:num]
        for token in tokens[num:].tolist():
            before = states[-1] if states else automaton.start
            states.append(automaton.follow(before, (token,)))
        self.tokens, self.states = tokens.copy(), states
        return states[-1] if states else automaton.start


@dataclass(frozen=True, eq=False)
class Structure:
    """The form of one answer."""

    automaton: TokenAutomaton
    _prefix: _Prefix = field(default_factory=_Prefix, init=False, repr=False)

    def strip(self, canvas: Canvas) -> tuple[int, Strip]:
        """The strip of a canvas for its next step, and the place where it begins.

        The place counts from ``Canvas.prompt_len``, in front of which is no mask.
        """
        automaton, start = self.automaton, canvas.answer_start
        ids, masked = canvas.ids[start:], canvas.masked[start:]
        (masks,) = masked.nonzero()
        first = int(masks[0]) if len(masks) else len(ids)
        (known,) = (~masked).nonzero()
        end = canvas.span_end + canvas.prompt_len - start
        if canvas.max_forwards == canvas.num_forwards + 1:
            end = len(ids)  # the last forward commits every mask
        if len(known):
            end = max(end, self._last_known(ids, known) + 1)
        end = max(end, first)
        classes = np.where(masked[first:end], -1, automaton.token_class[ids[first:end]])
        state = self._prefix.follow(automaton, ids[:first])
        longest = len(ids) if canvas.length is None else canvas.length.cap
        behind = max(longest, len(ids)) - end
        place = first + start - canvas.prompt_len
        return place, Strip(automaton, state, classes, behind)

    def known_tokens(self, canvas: Canvas) -> tuple[Ints, Ints]:
        """The masks of a new canvas that have one token in all answers, and the tokens.

        Their places are those in ``Canvas.ids``. No mask behind the first ``MAX_KNOWN``
        is among them.
        """
        num = canvas.answer_len
        longest = num if canvas.length is None else canvas.length.cap
        eos_id = canvas.eos_ids[0]
        automaton = weakref.ref(self.automaton)
        at, tokens = _known_tokens(automaton, num, max(num, longest), eos_id)
        return at + canvas.prompt_len, tokens

    def _last_known(self, ids: Ints, known: Ints) -> int:
        """The last committed token that decides anything.

        A canvas may end with committed EOS. All behind the first of them follow.
        """
        if known[-1] < len(ids) - 1:
            return int(known[-1])
        is_other = self.automaton.token_class[ids] != self.automaton.eos_class
        (others,) = is_other.nonzero()
        return min(int(others[-1]) + 1 if len(others) else 0, len(ids) - 1)

    def is_kept(self, canvas: Canvas) -> bool:
        """True if the answer of a canvas that is done has the form.

        Masks behind an EOS are no part of it.
        """
        answer = canvas.ids[canvas.answer_start :]
        (ends,) = np.isin(answer, canvas.eos_ids).nonzero()
        end = int(ends[0]) if len(ends) else len(answer)
        return self.automaton.takes(answer[:end].tolist())


@lru_cache(maxsize=64)
def _known_tokens(
    of: weakref.ref[TokenAutomaton], length: int, longest: int, eos_id: int
) -> tuple[Ints, Ints]:
    """As ``Structure.known_tokens``, in a canvas of ``length`` masks.

    Args:
        of: the automaton, which the cache does not keep alive.
    """
    automaton = of()
    assert automaton is not None, "the structure of the canvas has it"
    num = min(length, MAX_KNOWN)
    strip = Strip(automaton, automaton.start, np.full(num, -1), longest - num)
    programme = Programme([strip])
    (places,) = programme.certain.nonzero()
    classes = programme.possible[places].argmax(axis=1).tolist()
    tokens = [
        eos_id
        if one == automaton.eos_class
        else (automaton.token_class == one).argmax()
        for one in classes
    ]
    return places, np.array(tokens, dtype=np.int64)


class Structured:
    """The K candidates of structured canvases in one step.

    Attributes:
        candidates: ``(K,)`` int64: which of the N candidates.
        certain: ``(N,)`` bool: at these, every valid answer has the same token.
    """

    def __init__(self, inputs: StepInputs[Any, Any], which: Ints) -> None:
        """
        Args:
            which: the candidates, on the host.
        """
        batch, device = inputs.batch, inputs.device
        self._inputs, self._which = inputs, which
        self.candidates = _upload(which, device)
        strips, places = [], []
        for index, canvas in enumerate(batch.records):
            if canvas.structure is not None:
                place, strip = canvas.structure.strip(canvas)
                strips.append(strip)
                places.append((index, place, len(strip.classes)))
        programme = self._programme = Programme(strips)
        row_at = np.zeros((len(batch), batch.max_answer_len), dtype=np.int64)
        for rows, (index, place, width) in zip(programme.rows, places, strict=True):
            row_at[index, place : place + width] = rows[:width]
        canvas_index = inputs.canvas_index[self.candidates]
        self._at = inputs.positions[self.candidates]
        self._row = _upload(row_at, device)[canvas_index, self._at].clamp(min=0)
        self._possible = _upload(programme.possible, device)[self._row]
        self._token_class = [one.token_class_on(device) for one in programme.automata]
        self._form = _upload(programme.form, device)[self._row]
        is_free = np.array([one.has_free_text for one in programme.automata])
        self._in_text = _upload(is_free, device)[self._form, None]
        of_mask = [one[inputs.facts.mask_id] for one in self._token_class]
        self._class_of_mask = torch.stack(of_mask)[self._form, None]
        certain = torch.zeros_like(inputs.positions, dtype=torch.bool)
        self.certain = certain.index_put(
            (self.candidates,), _upload(programme.certain, device)[self._row]
        )

    def _chunks(self) -> list[slice]:
        size = self._inputs.facts.vocab_size
        return list(row_chunks(len(self.candidates), size, DRAW_ELEMENTS))

    def _classes(self, which: Candidates) -> torch.Tensor:
        """The class of each token: ``(1, V)``, or ``(n, V)`` with several forms."""
        if len(self._token_class) == 1:
            return self._token_class[0][None]
        return torch.stack(self._token_class)[self._form[which]]

    def _allowed(self, which: Candidates) -> torch.Tensor:
        """``(n, V)`` bool: the tokens that some valid answer has."""
        if fits_at_once(len(self.candidates), self._inputs.facts.vocab_size):
            return self._all_allowed[which]
        return self._find_allowed(which)

    @cached_property
    def _all_allowed(self) -> torch.Tensor:
        return self._find_allowed(slice(None))

    def _find_allowed(self, which: Candidates) -> torch.Tensor:
        possible, of_class = self._possible[which], self._classes(which)
        if len(of_class) == 1:
            return possible.index_select(1, of_class[0])
        return possible.gather(1, of_class)

    @cached_property
    def _place(self) -> torch.Tensor:
        """``(N,)`` int64: the place among the K candidates, -1 for another one."""
        place = torch.full_like(self._inputs.positions, -1)
        ordinal = torch.arange(len(self.candidates), device=place.device)
        return place.index_put((self.candidates,), ordinal)

    def edit(self, logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        """Tokens that no valid answer has get minus infinity."""
        if isinstance(some, torch.Tensor):
            place = self._place[some]
            is_free = (place < 0)[:, None]
            allowed = self._allowed(place.clamp(min=0)) | is_free
            return logits.masked_fill(~allowed, -torch.inf)
        start, stop, _ = some.indices(self._inputs.num_candidates)
        first, last = np.searchsorted(self._which, (start, stop)).tolist()
        allowed = self._allowed(slice(first, last))
        if last - first == stop - start:
            return logits.masked_fill(~allowed, -torch.inf)
        rows = self.candidates[first:last] - start
        changed = logits[rows].masked_fill(~allowed, -torch.inf)
        return logits.index_copy(0, rows, changed)

    def tokens(self, logits_of: LogitsOf) -> torch.Tensor:
        """``(K,)`` int64: the most probable valid answer, at the candidates.

        Free text keeps the tokens that the model is sure of, from left to right, and
        is the most probable one that does. Otherwise text would be more probable than
        a structure whose later tokens are not clear yet, and few would ever begin.

        Noise is added to the logits of a canvas with a temperature first. That draws
        from the joint distribution approximately (perturb and MAP), and exactly where
        one candidate is left.

        Waits for the device: the programme runs on the host.
        """
        programme, chunks = self._programme, self._chunks()
        mask_id = self._inputs.facts.mask_id
        shape = (programme.num_rows, programme.num_classes + 1)
        # A mask that is no candidate may become anything.
        table = torch.zeros(shape, dtype=torch.float64, device=self._at.device)
        table[:, -1] = -1
        best = []
        for rows in chunks:
            logits = logits_of(self.candidates[rows])
            scores = self._scores(logits, rows)
            best.append(self._best_of_classes(scores, rows))
            first = without_token(scores, mask_id).argmax(dim=1, keepdim=True)
            of_first = self._classes(rows).expand_as(scores).gather(1, first)
            worth = self._worth(best[-1], of_first, rows)
            sure = torch.where(self._is_sure(logits, first, rows), of_first, -1)
            whole = torch.cat((worth, sure.double()), dim=1)
            table = table.index_copy(0, self._row[rows], whole)
        on_host = table.cpu().numpy()
        worths, sures = np.hsplit(on_host, [programme.num_classes])
        found = programme.best_classes(
            np.ascontiguousarray(worths), sures[:, 0].astype(np.int64)
        )
        chosen = _upload(found, self._at.device)[self._row, None]
        tokens = []
        for rows, best_of_class in zip(chunks, best, strict=True):
            if len(chunks) > 1:
                scores = self._scores(logits_of(self.candidates[rows]), rows)
            most = best_of_class.gather(1, chosen[rows].clamp(min=0))
            # Not ``>=``: one of the class is taken whatever became of the logits.
            is_best = (self._classes(rows) == chosen[rows]) & ~(scores < most)
            # The first one wins among equal tokens.
            tokens.append(is_best.byte().argmax(dim=1))
        return torch.cat(tokens).masked_fill(chosen[:, 0] < 0, mask_id)

    def _best_of_classes(self, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        """``(n, C)``: the best score of each class."""
        of_class = self._classes(rows).expand_as(scores)
        shape = (len(scores), self._programme.num_classes)
        worst = scores.new_full(shape, -torch.inf)
        return worst.scatter_reduce(1, of_class, scores, "amax")

    def _is_sure(
        self, logits: torch.Tensor, first: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """``(n, 1)`` bool: where text is free and the model is sure of a token."""
        in_text = self._in_text[rows]
        if not any(one.has_free_text for one in self._programme.automata):
            return in_text
        logprob = logits.gather(1, first) - logits.logsumexp(dim=1, keepdim=True)
        return in_text & (logprob >= math.log(SURE))

    def _worth(
        self, best: torch.Tensor, of_first: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """``(n, C)`` float64: not below ``WORST``, 0 for the best possible class.

        That of the mask token is worse than all others.

        Args:
            best: the best score of each class.
            of_first: ``(n, 1)``: the class of the best token, the first among equals.
        """
        of_mask = self._class_of_mask[rows]
        score = best.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        score = score.masked_fill(~self._possible[rows], -torch.inf)
        score = score.scatter(1, of_mask, -torch.inf)
        most = score.amax(dim=1, keepdim=True)
        most = torch.where(most.isfinite(), most, 0.0)
        worth = (score - most).clamp(min=WORST).scatter(1, of_mask, 2 * WORST)
        return worth.scatter_add(1, of_first, torch.full_like(worth, TIE))

    def _scores(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """``(n, V)`` float: the logits, with noise where a token is drawn."""
        inputs, some = self._inputs, self.candidates[rows]
        records = inputs.batch.records
        if all(canvas.sampling.greedy for canvas in records if canvas.structure):
            return logits
        score = logits.masked_fill(~self._allowed(rows), -torch.inf).double()
        score[:, inputs.facts.mask_id] = -torch.inf
        score = score.nan_to_num(nan=-torch.inf)
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
        uniform = counter_uniform(seed[:, None], step[:, None], place, Stream.STRUCTURE)
        noise = -(-uniform.clamp(min=2.0**-54).log()).log()
        return torch.where(is_drawn[:, None], scaled + noise, score)


def structured(inputs: StepInputs[Any, Any]) -> Structured | None:
    """The candidates of canvases with a form; None where there are none."""
    records = inputs.batch.records
    wanted = [canvas.structure is not None for canvas in records]
    if not any(wanted):
        return None
    which = np.flatnonzero(np.repeat(wanted, inputs.counts))
    return Structured(inputs, which) if len(which) else None


def _upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
