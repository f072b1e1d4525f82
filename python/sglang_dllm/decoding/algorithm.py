"""What a decoding algorithm is: options, a plan per step, a rule for many canvases.

An algorithm has no state of its own; what it knows of its canvases is in tensors, one
row a canvas. Each denoising step goes: the algorithm plans for all its canvases at
once (``plan``), one forward, it judges them (``choose``), what it accepted is
committed. All of it is tensor code that never asks the device for a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.logits import Logits, LogitsOf
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.models.facts import Family, ModelFacts


@dataclass(frozen=True)
class StepInputs:
    """The candidates of all canvases that one algorithm judges in one step, packed.

    Attributes:
        canvases: B of them.
        step: what was planned for them.
        canvas_index: ``(N,)`` int64, ascending: the canvas of each candidate.
        positions: ``(N,)`` int64: the candidates, counted from the answer's start.
        counts: candidates of each canvas, on the host.
        logits_of: ``(n, V)`` of some candidates.
        uncond_logits_of: of the unconditional canvases' same candidates; only of
            guided canvases' ones is it meaningful. None where no canvas is guided.
    """

    canvases: CanvasBatch
    step: Step
    canvas_index: torch.Tensor
    positions: torch.Tensor
    counts: Sequence[int]
    logits_of: Logits
    uncond_logits_of: LogitsOf | None = None

    @property
    def facts(self) -> ModelFacts:
        return self.canvases.facts

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def num_canvases(self) -> int:
        return len(self.canvases)

    @property
    def num_candidates(self) -> int:
        return len(self.positions)

    def option(
        self, name: str, dtype: torch.dtype = torch.float64, missing: Any = 0
    ) -> torch.Tensor:
        """``(N,)``: each candidate's value of an option, ``missing`` for None."""
        return self.canvases.option(name, dtype, missing)[self.canvas_index]

    def option_is(self, name: str, value: Any) -> torch.Tensor:
        """``(N,)`` bool: whether each candidate's option has a value."""
        return self.canvases.option_is(name, value)[self.canvas_index]

    def quota(self) -> torch.Tensor:
        """``(N,)`` int64: each candidate's ``Step.quota``, else all of its canvas's."""
        quota = self.step.quota
        if quota is None:
            quota = self.step.candidates.sum(dim=1)
        return quota[self.canvas_index]

    def only(self, wanted: Sequence[bool]) -> torch.Tensor | None:
        """Indices ``(K,)`` of the candidates of some canvases, None if there are
        none; known without asking the device."""
        if not any(wanted):
            return None
        rows = np.flatnonzero(np.repeat(wanted, self.counts))
        return torch.from_numpy(rows).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Decision:
    """What an algorithm decided.

    Attributes:
        accepted: ``(N,)`` bool: the candidates to commit, at least one of a canvas
            now and then.
        tokens: ``(N,)`` int64: the token of every candidate, accepted or not.
        notes: anything for the algorithm's own ``committed``.
    """

    accepted: torch.Tensor
    tokens: torch.Tensor
    notes: Any = None


class Algorithm(ABC):
    """One published way of deciding which masks become tokens.

    Attributes:
        options: the keys it takes. Published defaults are in the class; those that
            differ by family are in ``defaults``.
        caches: strategies of ``decoding.cache`` it can be decoded with. All but
            ``none`` need spans that are smaller than the canvas, ``delayed`` needs
            blocks of ``block_size`` in order.
        statistics: what it always reads of its candidates' logits; a forward in a
            CUDA graph computes them too.
    """

    options: ClassVar[type[Options]]
    caches: ClassVar[tuple[str, ...]] = ("none",)
    statistics: ClassVar[tuple[Statistic, ...]] = ()

    @property
    def name(self) -> str:
        """What ``--dllm-algorithm`` and requests call it."""
        return type(self).__name__

    def defaults(self, family: Family) -> Mapping[str, Any]:
        """Published defaults that depend on the family."""
        return {}

    def unused_keys(self, family: Family, cache: str) -> frozenset[str]:
        """Keys of the options that mean nothing for a family or with a cache."""
        return frozenset()

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        """Fill in options that depend on the answer's length.

        Raises:
            OptionError: an option does not fit that length.
        """
        return options

    def complete(self, options: Any, facts: ModelFacts) -> Any:
        """Fill in options that depend on the model's tokenizer."""
        return options

    def is_guided(self, options: Any) -> bool:
        """Whether each forward also computes the unconditional canvas."""
        return False

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        """The algorithm's tensors ``(R, ...)`` for canvases with nothing decoded."""
        return {}

    @abstractmethod
    def plan(self, canvases: CanvasBatch) -> Step:
        """What the next forward decides.

        May write to ``ids``, ``masked`` and ``state``. CanvasBatch that are done are
        among them; what is planned for those is not looked at.
        """

    @abstractmethod
    def choose(self, judged: StepInputs) -> Decision:
        """Judge the candidates of all its canvases, in a few tensor operations."""

    def committed(
        self, judged: StepInputs, accepted: torch.Tensor, choice: Decision
    ) -> None:
        """Note in ``state`` what was committed: ``accepted`` ``(N,)`` bool."""
        return
