"""The forward inside a captured step: SGLang's model over windows that may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_dllm.attention.base import CanvasAttention
from sglang_dllm.attention.plan import DUMMY_SLOT, AttentionPlan, KVWrites, same_slots
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.static_group import StepTokens
from sglang_dllm.decoding.window import Window
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch


class WindowForward:
    """A ``StepForward`` of R windows of L tokens; every window reads the KV pool.

    Attention has to know the slots and the length of a canvas, and L. Where a window
    begins says the captured step itself. So a plan lasts as long as the canvases stay.
    """

    def __init__(
        self,
        model: Any,
        attention: CanvasAttention[Any],
        backend: Any,
        template: ForwardBatch,
        num_windows: int,
        length: int,
    ) -> None:
        """
        Args:
            model: computes hidden states ``(N, H)``.
            attention: of ``backend``.
            backend: SGLang's attention backend, which the layers call.
            template: a forward batch of the same kind of forward.
        """
        self.model, self.attention, self.backend = model, attention, backend
        self.num_windows, self.length = num_windows, length
        self._template = template
        device = attention.device
        self._no_slot = torch.full((1,), DUMMY_SLOT, device=device)
        slots = torch.zeros(num_windows * length, dtype=torch.int64, device=device)
        self._writes = KVWrites(slice(None), slots)
        self._bucket = attention.new_bucket(num_windows, length, self._writes)
        self._placed: list[torch.Tensor | None] | None = None

    def place(self, canvases: Sequence[Canvas]) -> None:
        """Plan attention over canvases, and over fillers up to R. Does nothing for
        the canvases of the call before."""
        slots = [canvas.kv_slots for canvas in canvases]
        if self._placed is not None and same_slots(slots, self._placed):
            return
        self._placed = None
        self.attention.fill_bucket(self._bucket, self._plan_of(canvases))
        self._placed = slots

    def hidden(self, tokens: StepTokens) -> torch.Tensor:
        """The hidden states ``(N, H)`` of ``tokens.logits_indices``, in a capture."""
        self._writes.slots.copy_(tokens.kv_slots)
        self.attention.use(self._bucket)
        plan = AttentionPlan([], tokens.logits_indices)
        batch = CanvasForwardBatch.of(
            self._template, tokens.ids, tokens.positions, plan
        )
        with forward_context(ForwardContext(attn_backend=self.backend)):
            out = self.model.forward(tokens.ids, tokens.positions, batch)
        hidden: torch.Tensor = out.hidden_states
        return hidden

    def _plan_of(self, canvases: Sequence[Canvas]) -> AttentionPlan:
        """Windows of L tokens with the keys of the canvases. Their starts say
        nothing: the bucket's own slots get the writes."""
        windows = [
            _window(len(canvas), canvas.kv_slots, self.length) for canvas in canvases
        ]
        num_fillers = self.num_windows - len(windows)
        windows += [_window(1, self._no_slot, self.length)] * num_fillers
        return AttentionPlan(windows, self._no_slot[:0], num_fillers)


def _window(canvas_len: int, kv_slots: torch.Tensor | None, length: int) -> Window:
    end = min(canvas_len, length)
    return Window(0, end, canvas_len, kv_slots, padding=length - end)
