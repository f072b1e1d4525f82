"""The interface of a decoding algorithm: options, next step, decision.

An algorithm object has no state of its own. It keeps what it knows of its canvases in
tensors with one row a canvas. Each denoising step calls ``next_step`` for all canvases
of the algorithm, runs one forward, and calls ``decide`` and ``on_commit``. All of it is
tensor code that never copies a value from the device to the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, OptionsT, StateT
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import Family, ModelFacts


@dataclass
class NoState(TensorRows):
    """The state of an algorithm that keeps nothing."""


class Algorithm(ABC, Generic[OptionsT, StateT]):
    """One published way of deciding which masks become tokens.

    Attributes:
        options: the keys that a request may set. Published defaults are in the class;
            those that differ by family are in ``defaults``.
        state: the dataclass of tensors that ``begin`` returns. All canvases have the
            same fields, so that their tensors can be concatenated.
        caches: names of the cache strategies that it can be decoded with. All but
            ``none`` need spans that are smaller than the canvas. ``delayed`` needs
            blocks of ``block_size`` in order.
        by_length: keys that ``finalize`` fills in by the answer's length.
        statistics: what it always reads of its candidates' logits. They are computed
            before ``decide``, outside of the guard that catches its errors.
    """

    options: ClassVar[type[Options]]
    state: ClassVar[type[TensorRows]] = NoState
    caches: ClassVar[tuple[str, ...]] = ("none",)
    by_length: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[tuple[Statistic, ...]] = ()

    @property
    def name(self) -> str:
        """The name in ``--dllm-algorithm`` and in requests."""
        return type(self).__name__

    def defaults(self, family: Family) -> Mapping[str, Any]:
        """Published defaults that depend on the family."""
        return {}

    def unused_keys(self, family: Family, cache: str) -> frozenset[str]:
        """Keys of the options that mean nothing for a family or with a cache."""
        return frozenset()

    def finalize(
        self, options: OptionsT, answer_len: int, facts: ModelFacts
    ) -> OptionsT:
        """Fill in options that depend on the answer's length or on the tokenizer.

        Raises:
            OptionError: an option does not fit that length.
        """
        return options

    def is_guided(self, options: OptionsT) -> bool:
        """True if each forward also computes the unconditional canvas."""
        return False

    def changes_logits(self, options: OptionsT) -> bool:
        """Whether ``decide`` measures other logits than the forward's."""
        return self.is_guided(options)

    def captured_options(self, options: OptionsT) -> OptionsT | None:
        """The options with which a step of this canvas may be captured.

        A captured step runs the kernels of ``decide``, ``on_commit`` and ``next_step``
        without their Python, for any canvases whose options give the same answer here.
        During the capture, this answer stands for the options of every canvas. So what
        differs among them must be in tensors. None if Python has to read the options in
        each step.
        """
        return None

    def begin(
        self, batch: CanvasBatch[OptionsT, Any], options: OptionsT
    ) -> StateT | NoState:
        """The state of one canvas with nothing decoded: tensors ``(1, ...)``.

        Args:
            batch: the canvas alone, without a state.
        """
        return NoState()

    @abstractmethod
    def next_step(self, batch: CanvasBatch[OptionsT, StateT]) -> Step:
        """Name the candidates of the next forward.

        May call ``batch.fill`` and write to ``batch.state``. Canvases that are done
        are in the batch too; nobody looks at their step.
        """

    @abstractmethod
    def decide(self, inputs: StepInputs[OptionsT, StateT]) -> Decision:
        """Decide on the candidates of all canvases in a few tensor operations."""

    def scores(self, batch: CanvasBatch[OptionsT, StateT]) -> torch.Tensor | None:
        """``(R, A)`` float64: the numbers that the host gets of the answer's tokens.

        None of an algorithm that generates.
        """
        return None

    def on_commit(
        self,
        inputs: StepInputs[OptionsT, StateT],
        accepted: torch.Tensor,
        decision: Decision,
    ) -> None:
        """Note in the state which candidates were committed: ``(N,)`` bool."""
        return
