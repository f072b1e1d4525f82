"""Common parts of the reference algorithms: the canvas, `x0` and its confidence, draws.

A `Canvas` runs forwards and writes tokens; which positions are written is decided by
the algorithms (`reference.samplers`, `reference.confidence`). The rules are those of
docs/algorithms.md, 'What all of them share', said with plain lists and scalars.

Every decision leaves a *gap*, its distance to another outcome: a confidence to its
threshold, the last rank taken to the first one left, the best logit to the second, a
drawn number to the border of its token. The smallest one of a forward is the `margin`
of its trace step. Decisions that no logit takes part in (`u < p` of Dream's `origin`,
LLaDA's random order) have none: rounding cannot flip them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from reference.cache import Forwards, Span
from reference.edits import NONE, Edits
from reference.memory import check_computed
from reference.record import Forward, Result
from reference.template import Part, Template, behind_given, fill_in, run_forward

# Unit of a random number: ("token" | "order", forwards run before, answer position).
Uniform = Callable[[str, int, int], float]


@dataclass(frozen=True)
class Sampling:
    """How `x0` is chosen. Temperature 0 is the argmax, whatever the rest says."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 0
    uniform: Uniform | None = None  # None: a generator of our own, from `seed`

    def draw(self, stream: str, step: int, position: int) -> float:
        """A number in [0, 1)."""
        if self.uniform is not None:
            return float(self.uniform(stream, step, position))
        return random.Random(f"{self.seed} {stream} {step} {position}").random()


GREEDY = Sampling()


@dataclass(frozen=True)
class Guess:
    """The prediction of one forward for one masked position."""

    token: int  # x0
    confidence: float
    gap: float  # distance to another x0
    probs: torch.Tensor  # (V,) float64, what x0 is the best of or is drawn from


class Canvas:
    """Prompt and answer ids, with the record of who wrote what. No decisions.

    Positions are those of the canvas; results and draws count from the answer's start.
    """

    def __init__(
        self,
        model: Any,
        prompt_ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        options: dict[str, Any],
        *,
        family: str | None = None,
        mask_id: int | None = None,
        eos_id: int | None = None,
        eot_token_id: int | None = None,
        delimiter_ids: Iterable[int] | None = None,
        template: Template | None = None,
        part: Part | None = None,
        edits: Edits = NONE,
    ) -> None:
        """options: the algorithm's, read here for `max_forwards` and the cache."""

        def fact(name: str, given: Any, default: Any = None) -> Any:
            return getattr(model, name, default) if given is None else given

        self.sampling = sampling
        self.max_forwards: int | None = options["max_forwards"]
        self.family: str = fact("family", family)
        self.mask_id: int = fact("mask_id", mask_id)
        self.eos_id: int = fact("eos_id", eos_id)
        self.eot_token_id: int | None = fact("eot_token_id", eot_token_id)
        self.delimiter_ids = frozenset(fact("delimiter_ids", delimiter_ids, ()))
        if self.family not in ("llada", "dream"):
            raise ValueError(f"family: expected llada or dream, found {self.family}")
        self.prompt_len = len(prompt_ids)
        self.ids, self.given = fill_in(
            prompt_ids, max_new_tokens, self.mask_id, template, part
        )
        self.part, self.edits = part, edits
        self.written_by: list[int | None] = [None] * len(self.ids)
        self.trace: list[Forward] = []
        self.forwards = Forwards(
            model, options, family=self.family, prompt_len=self.prompt_len,
            canvas_len=len(self.ids), max_forwards=self.max_forwards,
        )  # fmt: skip

    @property
    def nfe(self) -> int:
        return len(self.forwards.windows)

    def masked(self, start: int = 0, end: int | None = None) -> list[int]:
        """Masked positions of the answer in [start, end), ascending."""
        end = len(self.ids) if end is None else min(end, len(self.ids))
        return [i for i in range(start, end) if self.is_masked(i)]

    def is_masked(self, i: int) -> bool:
        return self.ids[i] == self.mask_id and not self.given[i]

    @property
    def decoded_len(self) -> int:
        """The answer up to its last mask, which may be less than all of it."""
        return max(self.masked(), default=self.prompt_len - 1) + 1 - self.prompt_len

    def blocks(self, block_size: int) -> list[tuple[int, int]]:
        """(start, end) of each block of the answer; the last one may be short."""
        end = len(self.ids)
        starts = range(self.prompt_len, end, block_size)
        return [(start, min(start + block_size, end)) for start in starts]

    def forward(self, span: Span | None = None) -> torch.Tensor:
        """One forward over the whole canvas: (L, V) float64, row i predicts i.

        With a cache maybe of a part only, as needed to decode `span`. Algorithms of
        the whole canvas have none.
        """
        logits = run_forward(self, span)
        # A copy: the algorithms change it, and a recorded one is used again.
        return logits.to(torch.float64, copy=True)

    def uniform(self, stream: str, position: int) -> float:
        """The random number of a position for the forward just run."""
        step = self.nfe - 1
        return self.sampling.draw(stream, step, position - self.prompt_len)

    def guess(self, row: torch.Tensor, position: int) -> Guess:
        """row: (V,) float64 -> x0 and its confidence at one position."""
        check_computed(row, position)
        row = self.edits.row(self, row, position)
        sampling = self.sampling
        whole = torch.softmax(row, dim=-1)
        allowed = row.clone()
        allowed[self.mask_id] = -torch.inf
        if sampling.temperature == 0:
            best, second = allowed.topk(2).values.tolist()
            # First index of the maximum, said plainly: topk promises no tie order.
            token = int((allowed == best).nonzero()[0])
            return Guess(token, float(whole[token]), best - second, whole)
        kept, filter_gaps = _filter(allowed / sampling.temperature, sampling)
        probs = torch.softmax(kept, dim=-1)
        token, draw_gap = _invert(probs, self.uniform("token", position))
        confidence = whole[token] if self.family == "llada" else probs[token]
        return Guess(token, float(confidence), min([draw_gap, *filter_gaps]), probs)

    def guesses(self, logits: torch.Tensor, positions: list[int]) -> dict[int, Guess]:
        return {i: self.guess(logits[i], i) for i in positions}

    def draw_gaps(self, guesses: dict[int, Guess]) -> list[float]:
        """Gaps of every x0 that had a say, committed or not.

        With a temperature another x0 has quite another confidence. Without, the two
        are about equally confident, so only committed tokens matter.
        """
        if self.sampling.temperature == 0:
            return []
        return [guess.gap for guess in guesses.values()]

    def commit(
        self,
        chosen: Iterable[int],
        guesses: dict[int, Guess],
        logits: torch.Tensor,
        gaps: Iterable[float],
    ) -> list[int]:
        """Write x0 at the chosen positions, or everywhere in the last forward.

        `guesses` has all candidates; the last forward of `max_forwards` guesses the
        other masks from `logits`. `gaps` are those of the choice of positions.
        Returns the positions that were written: words may have kept some back.
        """
        candidates = list(guesses)
        gaps = list(gaps)
        if self.nfe == self.max_forwards:
            candidates = self.masked()
            chosen, gaps = candidates, []
            rest = [i for i in candidates if i not in guesses]
            guesses = guesses | self.guesses(logits, rest)
        is_last = self.nfe == self.max_forwards
        tokens = {i: guesses[i].token for i in chosen}
        tokens = self.edits.kept(self, tokens, logits, is_last)
        chosen = sorted(tokens)
        if not all(map(self.is_masked, chosen)):
            raise AssertionError(f"not masked: one of {chosen}")
        for i in chosen:
            self.ids[i] = tokens[i]
            self.written_by[i] = self.nfe - 1
            gaps.append(guesses[i].gap)

        def answer(positions: Iterable[int]) -> list[int]:
            return [i - self.prompt_len for i in positions]

        mask_best = [i for i in chosen if int(logits[i].argmax()) == self.mask_id]
        self.trace.append(
            Forward(
                candidates=answer(candidates), committed=answer(chosen), stale=[],
                mask_argmax=answer(mask_best), forced=[], eos_at=None, blocks=[],
                margin=min(gaps, default=float("inf")),
            )
        )  # fmt: skip
        return chosen

    def result(self) -> Result:
        answer = slice(self.prompt_len, None)
        return Result(
            self.ids[answer], self.nfe, self.written_by[answer], self.trace,
            ends_from=behind_given(self.given) - self.prompt_len,
            **self.forwards.record(),
        )  # fmt: skip


def share(total: int, parts: int) -> list[int]:
    """Split evenly; the first parts get one more where it does not divide."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def ranked(values: dict[int, float]) -> list[int]:
    """Positions by descending value; ties go to the lower position."""
    return sorted(values, key=lambda i: (-values[i], i))


def rank_gap(values: dict[int, float], order: list[int], num_taken: int) -> list[float]:
    """Distance of the last rank taken to the first one left, if there are both."""
    if not 0 < num_taken < len(order):
        return []
    last, first = values[order[num_taken - 1]], values[order[num_taken]]
    # Two zeros are exact (tokens taken out of the logits), no rounding parts them.
    return [] if last == first == 0 else [last - first]


def _filter(
    scaled: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, list[float]]:
    """scaled: (V,) logits over temperature -> same with dropped tokens at -inf."""
    values, order = scaled.sort(descending=True, stable=True)
    num_kept, gaps = len(values), []
    top_p, top_k = sampling.top_p, sampling.top_k
    probs = torch.softmax(values, dim=-1)
    least = sampling.min_p * probs[0]
    if top_p < 1:
        better = probs.cumsum(0)[:-1]
        # The best has nothing better, so it stays; the sums only grow.
        num_kept = 1 + int((better <= top_p).sum())
        gaps += (better - top_p).abs().tolist()
    if 0 < top_k < num_kept:
        num_kept = top_k
        if values[top_k - 1] > -torch.inf:
            gaps.append(float(values[top_k - 1] - values[top_k]))
    if sampling.min_p > 0:
        num_kept = min(num_kept, int((probs >= least).sum()))
        gaps += (probs[1:] - least).abs().tolist()
    kept = torch.full_like(scaled, -torch.inf)
    kept[order[:num_kept]] = values[:num_kept]
    return kept, gaps


def _invert(probs: torch.Tensor, u: float) -> tuple[int, float]:
    """The first token whose cumulative probability exceeds u, and its gap."""
    reached = probs.cumsum(0)
    aim = u * float(reached[-1])
    token = int((reached > aim).nonzero()[0])
    below = float(reached[token - 1]) if token else 0.0
    # Below the first token and above the last one there is nothing to flip to.
    down = aim - below if below > 0 else float("inf")
    up = float(reached[token]) - aim if reached[token] < reached[-1] else float("inf")
    return token, min(down, up)
