"""Captured steps of a toy model that is tensor code, so that a recording can replay it.

The model stands for attention over a KV pool: its logits depend on the tokens that the
slots of the canvas were last written with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmark.speed.launch_gap import Operations
from helpers.recorded_capture import RecordedCapture
from helpers.static_steps import Decoder
from helpers.toy_model import VOCAB, Request, held
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.static_group import StaticGroup, StepShape, StepTokens
from sglang_dllm.runtime.step_graphs import StepGraphs

ROOM = 64
"""Slots of each canvas, the longest of which is shorter."""

_HASHES = 9973


class PoolModel:
    """Logits from a table, by a hash of the whole canvas as the pool has it.

    It is the ``ModelForward`` of an engine, and the ``StepForward`` of a capture, whose
    head changes nothing.

    Attributes:
        steps: the captured steps. None where all is eager.
        between: the operations that compute between two replays, for each pair without
            an arrival, a departure or an eager step in between. They are counted while
            ``operations`` is entered.
        num_captured, num_eager: steps of each kind.
    """

    in_graph = False

    def __init__(self, num_canvases: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pool = torch.zeros(1 + num_canvases * ROOM, dtype=torch.int64)
        self.factors = torch.randint(1, _HASHES, (ROOM,), generator=generator)
        scale = torch.rand(_HASHES, 1, generator=generator) * 12
        self.table = torch.randn(_HASHES, VOCAB, generator=generator) * scale
        self.steps: StepGraphs | None = None
        self.operations, self.between = Operations(), []
        self.num_captured = self.num_eager = 0
        self._last: Group | None = None

    def place_slots(self, canvas: Canvas, number: int) -> None:
        """Give a canvas the slots of a number from 0."""
        first = 1 + number * ROOM
        canvas.place(torch.arange(first, first + len(canvas)), number)

    def capture(self, static: StaticGroup, shapes: Sequence[StepShape]) -> None:
        capture = self._noted(RecordedCapture())
        self.steps = StepGraphs(static, lambda hidden: hidden, VOCAB, capture)
        for shape in shapes:
            self.steps.capture(shape, self)

    def place(self, canvases: Sequence[Canvas]) -> None:
        pass

    def hidden(self, tokens: StepTokens) -> torch.Tensor:
        length = len(tokens.ids) // tokens.num_windows
        first = (tokens.kv_slots - tokens.positions).view(-1, length)[:, :1]
        firsts = first.expand(-1, length).flatten().clamp(min=0)
        parts = tokens.ids, tokens.positions, tokens.kv_slots, firsts
        return self.rows(*parts)[tokens.logits_indices]

    def launch_step(self, group: Group) -> bool:
        if self.steps is None or not self.steps.launch(group):
            return False
        self.num_captured += 1
        self._last = group
        return True

    def launch(self, packed: PackedForward) -> Logits:
        self._last = None
        self.num_eager += 1
        slots, firsts = [], []
        for canvas, window in zip(packed.canvases, packed.windows, strict=True):
            assert canvas.kv_slots is not None
            slots.append(canvas.kv_slots[window.start : window.end])
            firsts.append(canvas.kv_slots[:1].expand(window.end - window.start))
        parts = packed.input_ids, packed.positions, torch.cat(slots), torch.cat(firsts)
        return held(self.rows(*parts)[packed.logits_indices])

    def rows(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        firsts: torch.Tensor,
    ) -> torch.Tensor:
        """Logits ``(T, V)``.

        Args:
            firsts: ``(T,)``: the first slot of each token's canvas.
        """
        self.pool.index_put_((slots,), ids + 1)
        places = (firsts[:, None] + torch.arange(ROOM, device=ids.device)).clamp(
            max=len(self.pool) - 1
        )
        canvas = (self.pool[places] * self.factors).sum(dim=1)
        return self.table[(canvas + positions * 17 + ids * 5) % _HASHES]

    def _noted(self, capture: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(run: Any) -> Any:
            replay = capture(run)

            def launch() -> Any:
                steps = self.steps
                assert steps is not None
                if self._last is not None and self._last is steps.static.tenant:
                    self.between.append(list(self.operations.names))
                out = replay()
                self.operations.names.clear()
                return out

            return launch

        return noted


class RecordedDecoder(Decoder):
    """Decodes with a ``PoolModel``, in recordings of steps where they fit."""

    def start(self, num_canvases: int, shapes: Sequence[StepShape]) -> RecordedDecoder:
        self.model = PoolModel(num_canvases)
        if self.static is not None:
            self.model.capture(self.static, shapes)
        return self

    def join(self, request: Request) -> None:
        super().join(request)
        self.model.place_slots(self.canvases[-1], len(self.canvases) - 1)

    def step(self) -> None:
        group = self.denoiser.only_group()
        if group is not None and self.model.launch_step(group):
            self.denoiser.commit_captured()
        else:
            self.denoiser.commit(self.model.launch(self.denoiser.pack()))
        self.sync()
