"""A toy model and a loop for canvases that change their length, without SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.toy_model import (
    EOS,
    FAMILY,
    MASK,
    NEWLINE,
    TURN_END,
    Memory,
    Request,
    ToyModel,
    facts_of,
    held,
    reference_sampling,
)
from reference.lengths import DEFAULT_OPTIONS, Answer, run_with_length
from reference.memory import TokenModel
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.resolved import Decoding


class EndingModel(ToyModel):
    """Random logits of a text up to a position of the canvas, EOS behind it.

    It never predicts a mask, as no trained model does.
    """

    def __init__(self, seed: int, text_end: int, sharp: float = 9) -> None:
        super().__init__(seed)
        self.text_end, self.sharp = text_end, sharp

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(ids) * (self.sharp / 12)
        behind = torch.arange(len(ids)) - self.text_end
        logits[:, EOS] += 3 * behind.sign() + behind / 16
        logits[:, MASK] = -30
        return logits


@dataclass
class Decoded:
    """A canvas and its answer's length in each forward."""

    canvas: Canvas
    decoding: Decoding
    memories: list[Memory] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.canvas.ids[self.canvas.answer_start :].tolist()


def decode(family: str, requests: Sequence[Request]) -> list[Decoded]:
    """All requests in one batch, until each canvas is done; ``length`` is the cap."""
    facts, denoiser = facts_of(family), Denoiser(facts_of(family))
    server = parse_decode_config("FullAttnMultiBlock", FAMILY[family], {})
    found: list[Decoded] = []

    def join(one: Decoded) -> None:
        decoding = one.decoding.finalized(one.canvas.answer_len, facts)
        denoiser.join(denoiser.prepare(one.canvas, decoding))

    for request in requests:
        options = {"algorithm": request.algorithm, **request.options}
        decoding = server.resolve(options).resolved(request.length, facts)
        canvas = decoding.new_canvas(
            request.prompt,
            request.length,
            facts,
            sampling=request.sampling,
            ignore_eos=request.ignore_eos,
            ends_at_eos=not request.ignore_eos,
        )
        found.append(Decoded(canvas, decoding))
        join(found[-1])
    models = {
        id(one.canvas): request.model
        for one, request in zip(found, requests, strict=True)
    }
    denoiser.sync()
    while True:
        for one in found:
            if one.canvas.resize is not None:
                denoiser.remove([one.canvas])
                one.canvas.apply_resize()
                if not one.canvas.done:
                    join(one)
                    denoiser.sync()
        denoiser.remove([one.canvas for one in found if one.canvas.done])
        if not denoiser.canvases:
            return found
        _forward(denoiser, found, models)


def _forward(
    denoiser: Denoiser, found: list[Decoded], models: dict[int, ToyModel]
) -> None:
    packed = denoiser.pack()
    num_own = len(packed.windows) - packed.num_uncond
    of = {id(one.canvas): one for one in found}
    rows = []
    for index, ids in enumerate(packed.input_ids.split(packed.lens)):
        canvas, window = packed.canvases[index], packed.windows[index]
        one = of[id(canvas)]
        if window.is_full:
            new = [Memory(models[id(canvas)], len(canvas)) for _ in range(2)]
            one.memories = new if index < num_own else [one.memories[0], new[1]]
        rows.append(one.memories[index >= num_own].forward(ids, window.start))
        if index < num_own:
            one.lengths.append(len(canvas) - canvas.answer_start)
    denoiser.commit(held(torch.cat(rows)[packed.logits_indices]))
    denoiser.sync()
    assert not any(one.canvas.failure for one in found)


def expected(family: str, request: Request) -> Answer:
    """The answer of the plain reference to a request."""
    options = dict(request.options)
    rule = options.pop("length")
    own = {key: options.pop(key) for key in DEFAULT_OPTIONS[rule] if key in options}
    if request.algorithm == "FullAttnMultiBlock" and request.ignore_eos:
        options["early_stop"] = False
    given = options.get("delimiter_ids")
    facts: dict[str, Any] = {"family": family, "mask_id": MASK, "eos_id": EOS}
    return run_with_length(
        rule,
        own,
        request.algorithm,
        TokenModel(request.model, bool(FAMILY[family].shift)),
        list(request.prompt),
        request.length,
        options,
        reference_sampling(request.sampling),
        ignore_eos=request.ignore_eos,
        eot_token_id=TURN_END,
        delimiter_ids=(NEWLINE,) if given is None else given,
        **facts,
    )
