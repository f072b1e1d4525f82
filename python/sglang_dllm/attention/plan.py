"""The attention plan: which windows a packed forward computes.

A plan travels in the ``plan`` field of its forward batch, which the runtime makes
(``runtime.forward_batch``). The model and the hooks on SGLang's attention backends read
it there, with ``plan_of``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch

from sglang_dllm.decoding.window import DUMMY_SLOT, Window

Tokens: TypeAlias = torch.Tensor | slice
"""Some of the T tokens of a packed forward: int64 indices, or a slice."""


class KVWrites(NamedTuple):
    """The tokens of a forward that write their keys and values to the pool, and where.

    Attributes:
        tokens: K of the T packed tokens.
        slots: ``(K,)`` int64, of the pool.
    """

    tokens: Tokens
    slots: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The windows of one packed forward of T tokens.

    Attributes:
        windows: in the order of the packed tokens, back to back.
        logits_indices: ``(N,)`` int64: the tokens whose hidden states are wanted. A
            head over all T tokens would cost as much as several blocks.
        num_filler_windows: so many windows at the end only fill the bucket of a CUDA
            graph. Their outputs are not read, and they write to ``DUMMY_SLOT``.
    """

    windows: Sequence[Window]
    logits_indices: torch.Tensor
    num_filler_windows: int = 0

    @cached_property
    def lens(self) -> list[int]:
        """Tokens of each window, padding included."""
        return [window.num_tokens for window in self.windows]

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lens)

    @cached_property
    def kv_writes(self) -> KVWrites | None:
        """The tokens of windows with KV slots; None where no window has any.

        Padding writes to ``DUMMY_SLOT``. Two equal tokens of one batch may get keys
        that differ in the last bit, so a repeated write to a real slot would make a
        run depend on which of the two comes last.
        """
        tokens, slots, first = [], [], 0
        num_real = len(self.windows) - self.num_filler_windows
        for index, window in enumerate(self.windows):
            num_tokens, kv_slots = window.num_tokens, window.kv_slots
            if kv_slots is not None:
                tokens.append(torch.arange(first, first + num_tokens))
                end = window.end if index < num_real else window.start
                own = kv_slots[window.start : end]
                slots.append(own)
                if len(own) < num_tokens:
                    slots.append(
                        kv_slots.new_full((num_tokens - len(own),), DUMMY_SLOT)
                    )
            first += num_tokens
        if not slots:
            return None
        all_slots = torch.cat(slots)
        if len(all_slots) == first:
            return KVWrites(slice(None), all_slots)
        # A blocking copy would wait for the forward in flight.
        index = torch.cat(tokens).to(all_slots.device, non_blocking=True)
        return KVWrites(index, all_slots)


def plan_of(forward_batch: Any) -> AttentionPlan | None:
    """The plan that a forward batch carries; None for a batch of any other model."""
    return getattr(forward_batch, "plan", None)


def same_slots(
    a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]
) -> bool:
    """True if two lists hold the KV slots of the same canvases.

    The tensors are compared by identity, which asks the device for nothing. A canvas
    has one tensor of slots from its admission on, and nobody writes to it. The caller
    must keep a reference to what it compares with later, since Python may give the
    identity of a freed tensor to a new one.
    """
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def same_windows(a: Sequence[Window], b: Sequence[Window]) -> bool:
    """True if two forwards compute the same windows of the same canvases."""
    return same_slots([x.kv_slots for x in a], [y.kv_slots for y in b]) and all(
        (x.start, x.end, x.canvas_len, x.padding)
        == (y.start, y.end, y.canvas_len, y.padding)
        for x, y in zip(a, b, strict=True)
    )
