"""The forward of a CUDA graph: SGLang's model over windows that may move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_dllm.attention.backends import backend_of
from sglang_dllm.attention.base import CanvasAttention
from sglang_dllm.attention.plan import AttentionPlan, KVWrites, same_slots
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.static_group import StepTokens
from sglang_dllm.decoding.window import DUMMY_SLOT, Window
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graph_grid import Bucket


@dataclass(frozen=True)
class ModelParts:
    """The parts of SGLang's model runner that a captured forward runs.

    Attributes:
        model: computes hidden states ``(N, H)``, and ``logits`` of those.
        attention: of ``backend``.
        backend: SGLang's attention backend, which the layers call.
    """

    model: Any
    attention: CanvasAttention[Any]
    backend: Any

    @classmethod
    def of(cls, runner: Any) -> ModelParts:
        """
        Args:
            runner: SGLang's, with an attention backend of ``attention.backends``.
        """
        upstream = upstream_backend(runner)
        backend = backend_of(upstream)
        assert backend is not None, "no attention of ours serves this backend"
        return cls(runner.model, backend.attention_of(upstream), upstream)

    @cached_property
    def template(self) -> ForwardBatch:
        """A forward batch that says which kind of forward a captured one is. Everything
        else that the model reads is in the plan."""
        one = torch.ones(1, dtype=torch.int64, device=self.attention.device)
        return ForwardBatch(
            forward_mode=ForwardMode.DLLM_EXTEND,
            batch_size=1,
            input_ids=one,
            req_pool_indices=one,
            seq_lens=one,
            out_cache_loc=one,
            seq_lens_sum=1,
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(n, V)`` of hidden states ``(n, H)``."""
        logits: torch.Tensor = self.model.logits(hidden, self.template)
        return logits

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """The hidden states ``(N, H)`` of ``plan.logits_indices``, for an attention
        that is planned.

        Args:
            ids, positions: ``(T,)`` int64.
        """
        batch = CanvasForwardBatch.of(self.template, ids, positions, plan)
        with forward_context(ForwardContext(attn_backend=self.backend)):
            out = self.model.forward(ids, positions, batch)
        hidden: torch.Tensor = out.hidden_states
        return hidden


def upstream_backend(runner: Any) -> Any:
    """SGLang's attention backend for our forwards, which are prefills."""
    found = runner.attn_backend
    is_pair = type(found).__name__ == "HybridAttnBackend"
    return found.prefill_backend if is_pair else found


class WindowForward:
    """A ``StepForward`` of R windows of L tokens; every window reads the KV pool.

    Attention has to know the slots and the length of a canvas, and L. The captured step
    itself knows where a window begins. So a plan lasts as long as the canvases stay.
    """

    def __init__(self, parts: ModelParts, bucket: Bucket, max_canvas_len: int) -> None:
        """
        Args:
            max_canvas_len: the longest canvas that there is room for, in tokens.
        """
        self._parts = parts
        self.num_windows, self.length = num_windows, length = bucket
        attention = parts.attention
        self.device = device = attention.device
        self._no_slot = torch.full((1,), DUMMY_SLOT, device=device)
        slots = torch.zeros(num_windows * length, dtype=torch.int64, device=device)
        self._writes = KVWrites(slice(None), slots)
        self._bucket = attention.new_bucket(
            num_windows, length, max_canvas_len, self._writes
        )
        self._placed: list[torch.Tensor | None] | None = None

    def place(self, canvases: Sequence[Canvas]) -> None:
        """Plan attention over canvases, and over fillers up to R. Does nothing for
        the canvases of the call before."""
        slots = [canvas.kv_slots for canvas in canvases]
        if self._placed is not None and same_slots(slots, self._placed):
            return
        self._placed = None
        self._parts.attention.fill_bucket(self._bucket, self._plan_of(canvases))
        self._placed = slots

    def hidden(self, tokens: StepTokens) -> torch.Tensor:
        """The hidden states ``(N, H)`` of ``tokens.logits_indices``, in a capture."""
        self._writes.slots.copy_(tokens.kv_slots)
        self._parts.attention.use(self._bucket)
        plan = AttentionPlan([], tokens.logits_indices)
        return self._parts.hidden(tokens.ids, tokens.positions, plan)

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
