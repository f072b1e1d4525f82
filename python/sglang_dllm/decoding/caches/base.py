"""The interface of a cache strategy: it chooses the windows of the next forward.

With full attention, the keys and values of every token depend on all tokens. Keys and
values that a forward does not compute again are old, so the result is approximate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.forward_limit import is_last_forward
from sglang_dllm.decoding.options import Options, StrictModel
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import Family

Batch: TypeAlias = CanvasBatch[Any, Any]


class Windows(NamedTuple):
    """Half-open ranges of the whole canvas, prompt included; ``(R,)`` int64 each."""

    start: torch.Tensor
    end: torch.Tensor


class CacheOptions(StrictModel):
    """The options of a strategy; most have none."""


@dataclass
class NoCacheState(TensorRows):
    """The state of a strategy that remembers nothing."""


@dataclass
class RefreshState(TensorRows):
    """The state of a strategy that refreshes where another span starts.

    Attributes:
        refreshed_at: ``(R,)`` int64: start of the span at the last refresh, -1 before.
    """

    refreshed_at: torch.Tensor

    def refresh_at_new_span(self, step: Step) -> torch.Tensor:
        """``(R,)`` bool: whether the span starts elsewhere than at the last refresh."""
        is_new = step.start != self.refreshed_at
        self.refreshed_at = step.start
        return is_new


CacheOptionsT = TypeVar("CacheOptionsT", bound=CacheOptions)
CacheStateT = TypeVar("CacheStateT", bound=TensorRows)


class CacheStrategy(ABC, Generic[CacheOptionsT, CacheStateT]):
    """One published way of choosing windows. One object serves all requests.

    Attributes:
        name: the value of the option ``cache``.
        options: the keys that only this strategy reads.
        keeps_kv: whether forwards write keys and values to the pool.
    """

    name: ClassVar[str]
    options: ClassVar[type[CacheOptions]] = CacheOptions
    keeps_kv: ClassVar[bool] = True

    def defaults(self, family: Family) -> Mapping[str, Any]:
        """Published defaults that depend on the family."""
        return {}

    @abstractmethod
    def begin(
        self, batch: Batch, options: CacheOptionsT, algorithm_options: Options
    ) -> CacheStateT:
        """The state of one canvas with nothing decoded: tensors ``(1, ...)``."""

    @abstractmethod
    def next_windows(self, batch: Batch, state: CacheStateT, step: Step) -> Windows:
        """The windows of the next forward. May write to the state."""


class KVCache(CacheStrategy[CacheOptionsT, CacheStateT]):
    """A strategy that computes windows over keys and values in the pool."""

    @abstractmethod
    def choose(
        self, batch: Batch, state: CacheStateT, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        """The windows of the next forward, and ``(R,)`` bool: true for a full window.

        Windows may exceed the canvas; ``next_windows`` clips them. May write to the
        state.
        """

    def next_windows(self, batch: Batch, state: CacheStateT, step: Step) -> Windows:
        """As ``choose`` says, clipped, moved by the shift, full in a last forward.

        A model with a shift predicts a position from the token before it. Its windows
        begin one token early, as in dInfer. Otherwise no token would predict the first
        position of a window.
        """
        windows, is_full = self.choose(batch, state, step)
        last = is_last_forward(batch)
        if last is not None:
            is_full = is_full | last
        whole = whole_canvases(batch)
        start = (windows.start - batch.facts.family.shift).clamp(min=0)
        return Windows(
            torch.where(is_full, whole.start, start),
            torch.where(is_full, whole.end, torch.minimum(windows.end, whole.end)),
        )


def whole_canvases(batch: Batch) -> Windows:
    """Full windows. Nobody may write to them."""

    def make() -> Windows:
        end = batch.rows.prompt_len + batch.rows.answer_len
        return Windows(torch.zeros_like(end), end)

    windows: Windows = batch.memo("whole canvases", make)
    return windows
