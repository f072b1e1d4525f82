"""The inputs of a decision, and the decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, OptionsT, StateT
from sglang_dllm.decoding.logits import Logits, LogitsOf
from sglang_dllm.decoding.step import Step
from sglang_dllm.models.facts import ModelFacts


@dataclass(frozen=True)
class StepInputs(Generic[OptionsT, StateT]):
    """The N candidates of the canvases of one group in one step, packed.

    Attributes:
        batch: R canvases.
        step: what the forward decides.
        canvas_index: ``(N,)`` int64, ascending: the canvas of each candidate.
        positions: ``(N,)`` int64: the candidates, from the answer's start.
        counts: candidates of each canvas, on the host.
        logits: of the candidates.
        uncond_logits_of: logits of the same candidates without the prompt. They are
            valid for candidates of guided canvases; other entries are undefined. None
            if no canvas is guided.
        certain: ``(N,)`` bool: candidates to commit whatever the algorithm accepts: one
            token alone is possible there. None if no canvas has a form.
    """

    batch: CanvasBatch[OptionsT, StateT]
    step: Step
    canvas_index: torch.Tensor
    positions: torch.Tensor
    counts: Sequence[int]
    logits: Logits
    uncond_logits_of: LogitsOf | None = None
    certain: torch.Tensor | None = None

    @property
    def state(self) -> StateT:
        return self.batch.state

    @property
    def options(self) -> list[OptionsT]:
        return self.batch.options

    @property
    def facts(self) -> ModelFacts:
        return self.batch.facts

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def num_canvases(self) -> int:
        return len(self.batch)

    @property
    def num_candidates(self) -> int:
        return len(self.positions)

    def per_candidate(self, values: torch.Tensor) -> torch.Tensor:
        """``(N, ...)`` from ``(R, ...)``: the value of each candidate's canvas."""
        return values[self.canvas_index]

    def candidates_of(self, wanted: Sequence[bool]) -> torch.Tensor | None:
        """Indices ``(K,)`` of the candidates of some canvases, None if there are none.

        Args:
            wanted: of each canvas, on the host. The device is not asked.
        """
        if not any(wanted):
            return None
        found = np.flatnonzero(np.repeat(wanted, self.counts))
        return torch.from_numpy(found).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Decision:
    """The answer of an algorithm for one step.

    Attributes:
        accepted: ``(N,)`` bool: the candidates to commit. If an algorithm never
            accepts one of a canvas, the request fails after 100000 forwards.
        tokens: ``(N,)`` int64: the token of every candidate, accepted or not.
        payload: anything for the algorithm's own ``on_commit``.
        logits: those that the tokens are of. None for the forward's.
    """

    accepted: torch.Tensor
    tokens: torch.Tensor
    payload: Any = None
    logits: Logits | None = None

    def check(self, num_candidates: int) -> None:
        """Check what code from outside returned.

        Raises:
            ValueError: a tensor has another shape.
        """
        shape = (num_candidates,)
        if not self.accepted.shape == self.tokens.shape == shape:
            raise ValueError(f"accepted and tokens must have the shape {shape}")
