"""What a decoding algorithm is: options, a plan per step, a rule for many canvases.

An algorithm has no state of its own; what it knows of a request is in the request's
``DecodingState``. Each denoising step goes: every state plans (``begin_step``), one
forward, every algorithm present judges all its canvases at once (``choose``), every
state commits.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from sglang_dllm.decoding.canvas import Canvas, IdArray, SamplingOptions
from sglang_dllm.decoding.options import Options
from sglang_dllm.families import Family, ModelFacts

logger = logging.getLogger(__name__)

MAX_FORWARDS = 100_000
"""Of one request; the most steps that any option asks for."""


@dataclass(frozen=True)
class Step:
    """What one denoising step may commit.

    Attributes:
        candidates: absolute indices of the positions that are judged, ascending.
        forced: half-open range in which at least one candidate must be accepted;
            empty where nothing is forced.
        quota: how many of the best candidates to accept or to consider; None for
            all of them.
        share: the probability with which each candidate is accepted, for schedules
            of independent positions.
    """

    candidates: IdArray
    forced: tuple[int, int] = (0, 0)
    quota: int | None = None
    share: float = 0.0


class DecodingState(ABC):
    """How far one canvas is; the scheduler's thread is the only writer."""

    def __init__(
        self, canvas: Canvas, algorithm: Algorithm, options: Any, facts: ModelFacts
    ) -> None:
        self.canvas = canvas
        self.algorithm = algorithm
        self.options = options
        self.facts = facts
        self.step: Step | None = None
        self.failure: str | None = None

    def begin_step(self) -> Step | None:
        """Plan the next forward and keep the plan in ``step``.

        Returns None when the canvas needs no forward any more, or when the algorithm
        failed; ``failure`` then says how.
        """
        self.step = None
        if self.canvas.finished:
            return None
        try:
            step = self.plan_step()
            if self.canvas.num_forwards >= MAX_FORWARDS:
                raise RuntimeError(f"no end after {MAX_FORWARDS} forwards")
        except Exception as error:  # may be a third party's code
            self.fail(error)
            return None
        if self.canvas.finished:
            # Planning filled what was left behind an EOS.
            return None
        if self.is_last_forward:
            masks = np.flatnonzero(self.canvas.masked)
            step = replace(step, candidates=masks)
        self.step = step
        return step

    def fail(self, error: Exception) -> None:
        """Give the request up; the others of its batch go on."""
        logger.error("%s failed", self.algorithm.name, exc_info=error)
        self.failure = f"{self.algorithm.name}: {error}"

    @property
    def is_last_forward(self) -> bool:
        """Whether ``max_forwards`` makes the next forward commit all that is left."""
        most = self.options.max_forwards
        return most is not None and self.canvas.num_forwards + 1 >= most

    @abstractmethod
    def plan_step(self) -> Step:
        """What the next forward decides, for a canvas with masks left."""

    def commit(self, positions: IdArray, token_ids: IdArray, note: int) -> None:
        """Write accepted tokens, after one forward.

        Args:
            positions: absolute indices, ascending.
            token_ids: the token of each.
            note: what the algorithm's ``choose`` said of this canvas, else 0.
        """
        self.canvas.commit(positions, token_ids)

    @property
    def is_guided(self) -> bool:
        """Whether each forward also computes ``unconditional_ids``."""
        return self.algorithm.is_guided(self.options)

    @property
    def num_rows(self) -> int:
        """Rows of the forward batch that the canvas takes."""
        return 2 if self.is_guided else 1

    def unconditional_ids(self) -> IdArray:
        """``(L,)`` int64: the canvas with its prompt masked, for guidance."""
        ids = self.canvas.ids.copy()
        ids[: self.canvas.prompt_len] = self.facts.mask_id
        return ids


@dataclass(frozen=True)
class Judged:
    """The candidates of all canvases that one algorithm judges in one step, packed.

    Attributes:
        states: the canvases, B of them.
        logits: ``(N, V)`` float: the rows that predict the candidates, in order.
        canvas_index: ``(N,)`` int64, ascending: the state of each candidate.
        positions: ``(N,)`` int64: the candidates, counted from the answer's start.
        unconditional: ``(U, V)``: rows of the unconditional canvases' same
            candidates, of the states that have one.
        facts: of the model.
    """

    states: Sequence[DecodingState]
    logits: torch.Tensor
    canvas_index: torch.Tensor
    positions: torch.Tensor
    unconditional: torch.Tensor | None
    facts: ModelFacts

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def num_canvases(self) -> int:
        return len(self.states)

    @cached_property
    def steps(self) -> list[Step]:
        """The plan of each canvas."""
        return [planned(state) for state in self.states]

    def per_canvas(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """``(B,)`` on the logits' device."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def option(
        self, name: str, dtype: torch.dtype = torch.float64, missing: float = 0.0
    ) -> torch.Tensor:
        """``(N,)``: each candidate's value of an option, ``missing`` for None."""
        values = [getattr(state.options, name) for state in self.states]
        values = [missing if value is None else value for value in values]
        return self.per_canvas(values, dtype)[self.canvas_index]

    def option_is(self, name: str, value: Any) -> torch.Tensor:
        """``(N,)`` bool: whether each candidate's option has a value."""
        uses = [getattr(state.options, name) == value for state in self.states]
        return self.per_canvas(uses, torch.bool)[self.canvas_index]

    def quota(self) -> torch.Tensor:
        """``(N,)`` int64: each candidate's ``Step.quota``."""
        quotas = [
            len(step.candidates) if step.quota is None else step.quota
            for step in self.steps
        ]
        return self.per_canvas(quotas, torch.int64)[self.canvas_index]

    @cached_property
    def sampling(self) -> list[SamplingOptions]:
        return [state.canvas.sampling for state in self.states]

    def only(self, chosen: Callable[[DecodingState], bool]) -> torch.Tensor | None:
        """Indices ``(K,)`` of the candidates of some canvases, None if there are
        none; known without asking the device."""
        wanted = [chosen(state) for state in self.states]
        if not any(wanted):
            return None
        counts = [len(step.candidates) for step in self.steps]
        rows = np.flatnonzero(np.repeat(wanted, counts))
        return torch.from_numpy(rows).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Choice:
    """What an algorithm decided.

    Attributes:
        accepted: ``(N,)`` bool: the candidates to commit, at least one of a canvas
            now and then.
        tokens: ``(N,)`` int64: the token of every candidate, accepted or not.
        notes: ``(B,)`` int64 for ``DecodingState.commit``, or None.
    """

    accepted: torch.Tensor
    tokens: torch.Tensor
    notes: torch.Tensor | None = None


class Algorithm(ABC):
    """One published way of deciding which masks become tokens.

    Attributes:
        options: the keys it takes. Published defaults are in the class; those that
            differ by family are in ``defaults``.
    """

    options: ClassVar[type[Options]]

    @property
    def name(self) -> str:
        """What ``--dllm-algorithm`` and requests call it."""
        return type(self).__name__

    def defaults(self, family: Family) -> Mapping[str, Any]:
        """Published defaults that depend on the family."""
        return {}

    def unused_keys(self, family: Family) -> frozenset[str]:
        """Keys of the options that mean nothing for a family."""
        return frozenset()

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        """Fill in options that depend on the answer's length.

        Raises:
            OptionError: an option does not fit that length.
        """
        return options

    def is_guided(self, options: Any) -> bool:
        """Whether each forward also computes the unconditional canvas."""
        return False

    @abstractmethod
    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        """The state of a new canvas."""

    @abstractmethod
    def choose(self, judged: Judged) -> Choice:
        """Judge the candidates of all its canvases, in a few tensor operations."""


def planned(state: DecodingState) -> Step:
    """The step that has begun."""
    assert state.step is not None, "the step has not begun"
    return state.step
