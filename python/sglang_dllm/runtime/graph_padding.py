"""Padding of a forward's windows to the bucket of a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sglang_dllm.attention.plan import AttentionPlan, same_windows
from sglang_dllm.decoding.window import Window


@dataclass(frozen=True)
class PaddedWindows:
    """The windows of a plan, padded to a bucket of B windows of L tokens.

    A short window repeats its last token, and the last window is repeated until there
    are B. Nobody reads the outputs of padding, and its keys and values go to a slot
    that no canvas owns, so nothing has to be masked.

    Attributes:
        windows: of the plan.
        shape: B and L.
        plan: with B windows of L tokens.
        sources: ``(B * L,)`` int64: the token of the plan that each padded token is.
        places: ``(T,)`` int64: where each token of the plan is among the padded ones.
    """

    windows: Sequence[Window]
    shape: tuple[int, int]
    plan: AttentionPlan
    sources: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(
        cls, plan: AttentionPlan, shape: tuple[int, int], device: torch.device
    ) -> PaddedWindows:
        sources, places = padding_indices(plan.lens, *shape)
        return cls(
            plan.windows,
            shape,
            padded_plan(plan, *shape),
            sources.to(device, non_blocking=True),
            places.to(device, non_blocking=True),
        )

    def matches(self, plan: AttentionPlan, shape: tuple[int, int]) -> bool:
        """True if these are the windows of another plan, too."""
        return self.shape == shape and same_windows(plan.windows, self.windows)


def padded_plan(plan: AttentionPlan, num_windows: int, length: int) -> AttentionPlan:
    """A plan of ``num_windows`` windows of ``length`` tokens."""
    windows = [
        replace(window, padding=length - (window.end - window.start))
        for window in plan.windows
    ]
    num_fillers = num_windows - len(windows)
    windows += [windows[-1]] * num_fillers
    return AttentionPlan(windows, plan.logits_indices, num_fillers)


def padding_indices(
    lens: Sequence[int], num_windows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``PaddedWindows.sources`` and ``places`` of windows of ``lens``, on the CPU."""
    sources, places, first = [], [], 0
    for index, num_tokens in enumerate(lens):
        sources.append(first + torch.arange(length).clamp(max=num_tokens - 1))
        places.append(index * length + torch.arange(num_tokens))
        first += num_tokens
    sources += [sources[-1]] * (num_windows - len(sources))
    return torch.cat(sources), torch.cat(places)
