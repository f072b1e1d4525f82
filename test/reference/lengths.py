"""Answers whose length is found while they are decoded, by any reference algorithm.

A canvas is decoded in parts. A part is a canvas of `reference.algorithms`: its prompt
is all in front of it, its answer is what it starts with, masks and committed tokens. A
rule of the length looks at the canvas after each forward that computed all of it. The
part ends with a change of the length, and another one begins: at the start of the first
block that has a mask, or at the end if none has. Blocks count from the part's
start. The algorithm and its cache begin anew; forwards are counted on.

- `append` (iLLaDA, arXiv 2606.25331): `append_blocks` blocks of masks at a time; when
  all are committed without an EOS, the next ones come behind them.
- `rho_eos`, `daedal`: as in `reference.length_loops`, which they equal with the rule of
  `FastDLLM` (`test_reference_lengths.py`).

An EOS ends the answer as soon as it and all before it are committed; what the rule
would do then is not asked. With `ignore_eos` the rule alone ends it. The forward that
`max_forwards` names commits all masks and is the last one; no rule is asked then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from reference.algorithms import DEFAULTS, run
from reference.canvas import GREEDY, Sampling
from reference.length_loops import MAX_ADJUST_STEPS, eos_confidence, length_step
from reference.record import Forward
from reference.template import Part

DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "append": {"append_blocks": 1},
    "rho_eos": {
        "initial_length": 64,
        "length_step": 8,
        "eos_check_tokens": 32,
        "low_density": 0.4,
        "high_density": 0.6,
        "step_schedule": "exp",
    },
    "daedal": {
        "initial_length": 64,
        "length_step": 8,
        "eos_check_tokens": 32,
        "start_eos_confidence": 0.5,
        "insert_eos_confidence": 0.9,
        "insert_confidence": 0.1,
    },
}


@dataclass(frozen=True)
class Change:
    """Remove positions of the answer, and put masks and then EOS in their place."""

    at: int
    remove: int = 0
    insert: int = 0
    num_eos: int = 0


@dataclass
class Answer:
    """A finished answer, or one that is being decoded.

    Attributes:
        ids: the answer so far, the mask id where nothing is committed.
        start: where the part that is being decoded begins.
        padding: how many EOS at the end a rule put there.
        lengths: of the answer, in each forward.
        trace: of the forwards that committed something.
        margin: the smallest distance of a decision of the rule to another one.
    """

    ids: list[int]
    start: int = 0
    padding: int = 0
    lengths: list[int] = field(default_factory=list)
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0
    trace: list[Forward] = field(default_factory=list)
    margin: float = float("inf")

    @property
    def nfe(self) -> int:
        return len(self.lengths)


class _Stop(Exception):
    """The part ends before its next forward."""


@dataclass
class _Watch:
    """Ends a part before the forward that follows a change or an end."""

    seen: Callable[[Any, torch.Tensor], None]
    ends: Callable[[Any], bool]
    canvas: Any = None

    def before(self, canvas: Any) -> None:
        if self.canvas is not None and self.ends(canvas):
            raise _Stop

    def after(self, canvas: Any, logits: torch.Tensor) -> None:
        self.canvas = canvas
        self.seen(canvas, logits)


class Decoder:
    """Decodes one answer."""

    def __init__(
        self,
        rule: str,
        rule_options: dict[str, Any],
        algorithm: str,
        model: Any,
        prompt_ids: list[int],
        cap: int,
        options: dict[str, Any],
        sampling: Sampling,
        ignore_eos: bool,
        facts: dict[str, Any],
    ) -> None:
        self.rule, self.algorithm, self.model = rule, algorithm, model
        self.rule_options = DEFAULT_OPTIONS[rule] | rule_options
        self.prompt_ids, self.cap, self.options = prompt_ids, cap, options
        self.sampling, self.ignore_eos, self.facts = sampling, ignore_eos, facts
        self.family: str = facts.get("family") or model.family
        self.mask_id: int = facts.get("mask_id", getattr(model, "mask_id", None))
        self.eos_id: int = facts.get("eos_id", getattr(model, "eos_id", None))
        defaults = {"block_size": 32, **DEFAULTS[self.family][algorithm]}
        self.block_size: int = (defaults | options)["block_size"]
        self.max_forwards: int | None = options.get("max_forwards")
        self.measuring = rule == "daedal"
        self.answer = Answer([self.mask_id] * self._first_length())
        # The last forward's, if it computed the whole canvas.
        self.probs: torch.Tensor | None = None
        self.change: Change | None = None

    def _first_length(self) -> int:
        if self.rule == "append":
            unit = self.rule_options["append_blocks"] * self.block_size
            return min(unit, self.cap)
        return min(self.rule_options["initial_length"], self.cap)

    def run(self) -> Answer:
        answer = self.answer
        while not self._has_ended():
            is_full = self.mask_id not in answer.ids[answer.start :]
            is_last = answer.nfe + 1 == self.max_forwards
            if is_full and (is_last or answer.start == len(answer.ids)):
                break
            if not is_last and (is_full or self.measuring):
                self._measure()
            else:
                self._decode_part()
            if self.change is None:
                break
            self._apply(self.change)
        return answer

    def _has_ended(self) -> bool:
        """True if an EOS or `max_forwards` ended the answer."""
        ids = self.answer.ids
        if self.answer.nfe == self.max_forwards:
            return True
        if self.ignore_eos or self.eos_id not in ids:
            return False
        return self.mask_id not in ids[: ids.index(self.eos_id)]

    def _measure(self) -> None:
        """A forward that commits nothing."""
        answer = self.answer
        self.answer.tokens_computed += len(self.prompt_ids) + len(answer.ids)
        self.answer.full_refreshes += self.options.get("cache", "none") != "none"
        ids = torch.tensor([*self.prompt_ids, *answer.ids])
        self._note(self.model(ids))
        self.change = None if self._has_ended() else self._ask([])

    def _decode_part(self) -> None:
        """Forwards until the rule changes the length, or the part has no mask."""
        answer, before = self.answer, self.answer.nfe
        watch = _Watch(self._seen, self._ends)
        options = dict(self.options)
        if self.max_forwards is not None:
            options["max_forwards"] = self.max_forwards - before
        sampling = self.sampling
        if sampling.uniform is not None:
            draw = sampling.uniform
            sampling = replace(
                sampling,
                uniform=lambda stream, step, i: draw(stream, step + before, i),
            )
        part = answer.ids[answer.start :]
        try:
            run(
                self.algorithm,
                self.model,
                self.prompt_ids + answer.ids[: answer.start],
                len(part),
                options,
                sampling,
                part=Part(part, answer.padding, watch),
                unconditional=self._unconditional,
                **self.facts,
            )
            self._ends(watch.canvas)
        except _Stop:
            pass
        counts = watch.canvas.forwards.record()
        answer.tokens_computed += counts["tokens_computed"]
        answer.tokens_cached += counts["tokens_cached"]
        answer.full_refreshes += counts["full_refreshes"]
        answer.trace += watch.canvas.trace

    def _unconditional(self, ids: torch.Tensor) -> torch.Tensor:
        """The request's prompt alone is hidden, not what was committed since."""
        start, committed = len(self.prompt_ids), self.answer.ids[: self.answer.start]
        ids = ids.clone()
        ids[start : start + len(committed)] = torch.tensor(committed, dtype=ids.dtype)
        return self.model(ids)

    def _note(self, logits: torch.Tensor) -> None:
        self.answer.lengths.append(len(self.answer.ids))
        self.probs = torch.softmax(logits[len(self.prompt_ids) :].double(), dim=-1)

    def _seen(self, canvas: Any, logits: torch.Tensor) -> None:
        self._note(logits)
        if canvas.forwards.windows[-1] not in (None, (0, len(canvas.ids))):
            self.probs = None

    def _ends(self, canvas: Any) -> bool:
        """Take over what is committed; true if the part ends here."""
        self.answer.ids[self.answer.start :] = canvas.ids[canvas.prompt_len :]
        self.change = None
        if self._has_ended():
            return True
        tried = canvas.trace[-1].candidates
        self.change = self._ask([i + self.answer.start for i in tried])
        return self.change is not None

    def _ask(self, candidates: list[int]) -> Change | None:
        """The change that the rule wants after a forward.

        candidates: of that forward; those that are masks now were not committed.
        """
        if self.rule == "append":
            return self._append()
        if self.probs is None:
            return None
        if self.rule == "rho_eos":
            return self._rho_eos(self.probs)
        return self._daedal(self.probs, candidates)

    def _append(self) -> Change | None:
        length = len(self.answer.ids)
        if self.mask_id in self.answer.ids or length >= self.cap:
            return None
        unit = self.rule_options["append_blocks"] * self.block_size
        return Change(length, insert=min(unit, self.cap - length))

    def _confidence(self, probs: torch.Tensor, *limits: float) -> float:
        """Notes the distances to the limits and to another set of predicted EOS."""
        found = eos_confidence(
            probs, self.eos_id, self.rule_options["eos_check_tokens"]
        )
        eos = probs[:, self.eos_id]
        others = probs.clone()
        others[:, self.eos_id] = -1
        gaps = (eos - others.amax(dim=-1)).abs().tolist()
        gaps += [abs(found - limit) for limit in limits]
        self.answer.margin = min(self.answer.margin, *gaps)
        return found

    def _rho_eos(self, probs: torch.Tensor) -> Change | None:
        options, length = self.rule_options, len(self.answer.ids)
        if length >= self.cap or self.answer.nfe > MAX_ADJUST_STEPS:
            return None
        low, high = options["low_density"], options["high_density"]
        limits = [low - i / 10 for i in range(4)] + [high + i / 10 for i in range(4)]
        density = self._confidence(probs, *limits)
        step = length_step(
            torch.tensor(density, dtype=torch.float32),
            options["length_step"],
            low,
            high,
            options["step_schedule"],
        )
        if step > 0:
            return Change(length, insert=min(step, self.cap - length))
        removed = min(-step, length)
        return Change(length - removed, remove=removed) if removed else None

    def _daedal(self, probs: torch.Tensor, candidates: list[int]) -> Change | None:
        options, length = self.rule_options, len(self.answer.ids)
        if self.measuring:
            enough = options["start_eos_confidence"]
            confidence = self._confidence(probs, enough)
            if confidence < enough and length < self.cap:
                step = min(options["length_step"], self.cap - length)
                return Change(length, insert=step)
            self.measuring = False
            tail = min(options["eos_check_tokens"] // 2, self.cap - length)
            return Change(length, num_eos=tail)
        limit = options["insert_eos_confidence"]
        if length >= self.cap or self._confidence(probs, limit) >= limit:
            return None
        left = [i for i in candidates if self.answer.ids[i] == self.mask_id]
        values = {i: float(probs[i].max()) for i in left}
        gaps = [abs(value - options["insert_confidence"]) for value in values.values()]
        low = {i: v for i, v in values.items() if v < options["insert_confidence"]}
        ranked = sorted(low.values())
        gaps += [b - a for a, b in pairwise(ranked[:2])]
        self.answer.margin = min([self.answer.margin, *gaps])
        if not low:
            return None
        return Change(min(low, key=low.__getitem__), 1, options["length_step"])

    def _apply(self, change: Change) -> None:
        """Change the answer, and begin at the first block that has a mask."""
        answer, masked = self.answer, self.mask_id
        first = len(answer.ids)
        if masked in answer.ids[answer.start :]:
            blocks = answer.ids.index(masked, answer.start) - answer.start
            first = answer.start + blocks // self.block_size * self.block_size
        end = change.at + change.remove
        put = [masked] * change.insert + [self.eos_id] * change.num_eos
        answer.ids = answer.ids[: change.at] + put + answer.ids[end:]
        answer.padding += change.num_eos
        answer.padding -= min(answer.padding, max(0, len(answer.ids) - self.cap))
        answer.ids = answer.ids[: self.cap]
        answer.start = min(first, len(answer.ids))


def run_with_length(
    rule: str,
    rule_options: dict[str, Any],
    algorithm: str,
    model: Any,
    prompt_ids: list[int],
    cap: int,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    *,
    ignore_eos: bool = False,
    **facts: Any,
) -> Answer:
    """Decode an answer of at most `cap` tokens.

    Args:
        rule_options: keys of `DEFAULT_OPTIONS`; the missing ones get the defaults.
        options, sampling, facts: see `reference.algorithms.run`.
    """
    decoder = Decoder(
        rule, rule_options, algorithm, model, prompt_ids, cap, options, sampling,
        ignore_eos, facts,
    )  # fmt: skip
    return decoder.run()
