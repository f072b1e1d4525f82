"""Captured steps of a toy model that is tensor code, so that a recording can replay it.

The model stands for attention over a KV pool: its logits depend on the tokens that the
slots of the canvas were last written with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.recorded_capture import RecordedCapture
from helpers.static_steps import Decoder
from helpers.toy_model import VOCAB, Request, held
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.static_group import StaticGroup, StepShape, StepTokens

ROOM = 64
"""Slots of each canvas, the longest of which is shorter."""


class Operations(TorchDispatchMode):
    """Lists the operations that compute: no views, and not the transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class PoolModel:
    """Logits from a table, by a hash of the whole canvas as the pool has it."""

    def __init__(self, num_canvases: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pool = torch.zeros(1 + num_canvases * ROOM, dtype=torch.int64)
        self.factors = torch.randint(1, 9973, (ROOM,), generator=generator)
        scale = torch.rand(9973, 1, generator=generator) * 12
        self.table = torch.randn(9973, VOCAB, generator=generator) * scale

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        first_slot: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        """``(N, V)``.

        Args:
            first_slot: ``(T,)`` of each token's canvas.
        """
        self.pool.index_put_((slots,), ids + 1)
        places = first_slot[:, None] + torch.arange(ROOM)
        canvas = self.pool[places.clamp(max=len(self.pool) - 1)] * self.factors
        key = (canvas.sum(dim=1) + positions * 17 + ids * 5) % 9973
        return self.table[key[logits_indices]]


class RecordedDecoder(Decoder):
    """Decodes with a ``PoolModel``, in recordings of steps where they fit.

    Attributes:
        operations: counts while it is entered.
        between: the operations that compute between two replays, for each pair without
            an arrival, a departure or an eager step in between.
    """

    def start(self, num_canvases: int, shapes: Sequence[StepShape]) -> RecordedDecoder:
        """Capture steps of some shapes, ascending."""
        self.model = PoolModel(num_canvases)
        self.between: list[list[str]] = []
        self.operations = Operations()
        self._last: Group | None = None
        capture = RecordedCapture()
        self._graphs: list[tuple[StepShape, Callable[[], Any]]] = []
        if self.static is not None:
            for shape in shapes:
                run = self._run_of(self.static, shape)
                self._graphs.append((shape, capture(run)))
        return self

    def join(self, request: Request) -> None:
        super().join(request)
        canvas = self.canvases[-1]
        first = 1 + (len(self.canvases) - 1) * ROOM
        canvas.place(torch.arange(first, first + len(canvas)), 0)

    def _run_of(
        self, static: StaticGroup, shape: StepShape
    ) -> Callable[[], tuple[torch.Tensor, ...]]:
        def forward(tokens: StepTokens) -> Logits:
            first = (tokens.kv_slots - tokens.positions).view(-1, shape.length)[:, :1]
            first = first.expand(-1, shape.length).flatten().clamp(min=0)
            parts = tokens.ids, tokens.positions, tokens.kv_slots, first
            return held(self.model(*parts, tokens.logits_indices))

        def run() -> tuple[torch.Tensor, ...]:
            static.step(shape, forward)
            return ()

        return run

    def _captured(self, static: StaticGroup, group: Group) -> None:
        num = sum(canvas.num_candidates for canvas in group.records)
        longest = max(end - start for start, end in (c.window for c in group.records))
        need = len(group.records), longest, num
        static.load(group)
        replay = next(
            replay
            for shape, replay in self._graphs
            if all(a >= b for a, b in zip(shape, need, strict=True))
        )
        if self._last is group:
            self.between.append(list(self.operations.names))
        self._last = group
        replay()
        self.operations.names.clear()
        static.report(group)
        self.denoiser.commit_captured()

    def _eager(self) -> None:
        self._last = None
        packed = self.denoiser.pack()
        slots, firsts = [], []
        for canvas, window in zip(packed.canvases, packed.windows, strict=True):
            assert canvas.kv_slots is not None
            slots.append(canvas.kv_slots[window.start : window.end])
            firsts.append(canvas.kv_slots[:1].expand(window.end - window.start))
        logits = self.model(
            packed.input_ids,
            packed.positions,
            torch.cat(slots),
            torch.cat(firsts),
            packed.logits_indices,
        )
        self.denoiser.commit(held(logits))
