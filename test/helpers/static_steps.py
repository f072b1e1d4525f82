"""Decodes with a toy model, in captured steps where they fit and eagerly elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.toy_model import (
    Memory,
    Request,
    facts_of,
    held,
    resolve,
    template_of,
)
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.static_group import StaticGroup, StepShape, StepTokens


def static_group(
    family: str, request: Request, num: int, canvas_len: int
) -> StaticGroup:
    """For answers as long as the request's."""
    return StaticGroup(
        resolve(family, request),
        facts_of(family),
        torch.device("cpu"),
        num_canvases=num,
        answer_len=request.length,
        canvas_len=canvas_len,
    )


def news(canvas: Canvas) -> tuple[Any, ...]:
    """Everything that a step tells the host of a canvas."""
    return (
        canvas.ids.tolist(),
        canvas.num_forwards,
        canvas.num_committed,
        canvas.cut_short,
        canvas.done,
        canvas.num_candidates,
        # A canvas that is done has no next forward.
        None if canvas.done else canvas.window,
        canvas.tokens_computed,
        canvas.full_refreshes,
    )


@dataclass
class Decoder:
    """A denoiser with a toy model.

    Attributes:
        static: runs the steps that fit; None to run all eagerly.
        longest: tokens of the longest window of a captured step.
        num_captured, num_eager: steps of each kind.
        history: by canvas, in the order of arrival, the news of each step.
    """

    family: str
    static: StaticGroup | None = None
    longest: int = 0
    num_captured: int = 0
    num_eager: int = 0
    canvases: list[Canvas] = field(default_factory=list)
    history: list[list[tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.denoiser = Denoiser(facts_of(self.family))
        self._memories: dict[int, Memory] = {}

    def join(self, request: Request) -> None:
        decoding = resolve(self.family, request)
        canvas = decoding.new_canvas(
            request.prompt,
            request.length,
            self.denoiser.facts,
            template=template_of(request.template),
            sampling=request.sampling,
            ignore_eos=request.ignore_eos,
            ends_at_eos=not request.ignore_eos,
        )
        self.denoiser.join(self.denoiser.prepare(canvas, decoding))
        self.canvases.append(canvas)
        self.history.append([])
        self._memories[id(canvas)] = Memory(request.model, len(canvas))

    def step(self) -> None:
        canvases = self.denoiser.canvases
        group = self.denoiser.only_group()
        static = self.static
        if (
            group is not None
            and static is not None
            and static.accepts(group)
            and max(end - start for start, end in (c.window for c in canvases))
            <= self.longest
        ):
            self.num_captured += 1
            self._captured(static, group)
        else:
            self.num_eager += 1
            self._eager()
        self.sync()

    def sync(self) -> None:
        self.denoiser.sync()
        for canvas, history in zip(self.canvases, self.history, strict=True):
            if canvas in self.denoiser.canvases:
                history.append(news(canvas))
        assert not any(canvas.failure for canvas in self.canvases)
        self.denoiser.remove([c for c in self.canvases if c.done])

    def _captured(self, static: StaticGroup, group: Group) -> None:
        records = group.records
        num = sum(canvas.num_candidates for canvas in records)
        # More rows, tokens and candidates than are needed, as in a bucket.
        shape = StepShape(static.num_canvases, self.longest, num + 3)

        def forward(tokens: StepTokens) -> Logits:
            ids = tokens.ids.view(shape.num_canvases, shape.length)
            rows = []
            for canvas, window in zip(records, ids, strict=False):
                start, end = canvas.window
                found = self._memories[id(canvas)].forward(window[: end - start], start)
                rows += [found, found[-1:].expand(shape.length - len(found), -1)]
            logits = torch.cat(rows)
            at = tokens.logits_indices.clamp(max=len(logits) - 1)
            return held(logits[at])

        static.load(group)
        static.step(shape, forward)
        static.report(group)
        self.denoiser.commit_captured()

    def _eager(self) -> None:
        packed = self.denoiser.pack()
        parts = packed.input_ids.split(packed.lens)
        logits = [
            self._memories[id(canvas)].forward(ids, window.start)
            for canvas, window, ids in zip(
                packed.canvases, packed.windows, parts, strict=True
            )
        ]
        self.denoiser.commit(held(torch.cat(logits)[packed.logits_indices]))


def decode(
    decoder: Decoder, requests: Sequence[Request], most: int = 3, every: int = 2
) -> list[list[tuple[Any, ...]]]:
    """One more request every few steps, up to some at once; the news of all steps."""
    waiting, steps = list(requests), 0
    while waiting or decoder.denoiser.canvases:
        if (
            waiting
            and len(decoder.denoiser.canvases) < most
            and (steps % every == 0 or not decoder.denoiser.canvases)
        ):
            decoder.join(waiting.pop(0))
            decoder.sync()
        if decoder.denoiser.canvases:
            decoder.step()
        steps += 1
        assert steps < 2000, "no end"
    return decoder.history
