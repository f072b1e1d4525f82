"""A toy model and a loop around our decoding, for tests without SGLang."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reference.canvas import Sampling
from reference.edits import NONE, Edits
from sglang_dllm.config.canvas_parts import CanvasParts
from sglang_dllm.config.resolve import Decoding
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.sampling import Stream, counter_uniform
from sglang_dllm.decoding.token_edits import TokenEdits
from sglang_dllm.models.facts import FAMILIES, ModelFacts

MASK, EOS, TURN_END, NEWLINE, VOCAB = 3, 5, 6, 7, 11
FAMILY = {"llada": FAMILIES["LLaDAModelLM"], "dream": FAMILIES["DreamModel"]}


class ToyModel:
    """Logits that depend on the whole canvas, position by position.

    Coarse values make ties common; scales from flat to saturated spread confidences.
    """

    def __init__(self, seed: int, eos_bias: float = 0.0, coarse: bool = False) -> None:
        self.seed, self.eos_bias, self.coarse = seed, eos_bias, coarse

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        state = self.seed
        for token in ids.tolist():
            state = (state * 1_000_003 + token + 1) % (1 << 61)
        generator = torch.Generator().manual_seed(state)
        logits = torch.randn(len(ids), VOCAB, generator=generator)
        logits *= torch.rand(len(ids), 1, generator=generator) * 12
        if self.coarse:
            logits = logits.round()
        logits[:, EOS] += self.eos_bias
        return logits

    def forward(self, packed: PackedForward) -> Logits:
        """The logits of a packed forward, all of whose windows are full."""
        rows = [self(ids) for ids in packed.input_ids.split(packed.lens)]
        return held(torch.cat(rows)[packed.logits_indices])

    def logprobs(self, ids: list[int], prompt_len: int, shift: int) -> torch.Tensor:
        """``(A, V)``: those of each answer position, without the mask token."""
        logits = self(torch.tensor(ids)).double()
        logits[:, MASK] = -torch.inf
        return logits[prompt_len - shift : len(ids) - shift].log_softmax(dim=-1)

    def shifted(self, family: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The logits of the references: row i predicts position i."""

        def logits(ids: torch.Tensor) -> torch.Tensor:
            raw = self(ids)
            return torch.cat([raw[:1], raw[:-1]]) if FAMILY[family].shift else raw

        return logits


@dataclass(frozen=True)
class Request:
    """One request to a toy model."""

    model: ToyModel
    prompt: tuple[int, ...]
    length: int
    algorithm: str
    options: dict[str, Any]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    ignore_eos: bool = False
    template: tuple[int | None, ...] | None = None
    """The answer's given ids, None for a mask; as long as the answer."""
    edits: TokenEdits | None = None


def facts_of(family: str) -> ModelFacts:
    return ModelFacts(FAMILY[family], MASK, (EOS,), VOCAB, TURN_END, (NEWLINE,))


def resolve(family: str, request: Request) -> Decoding:
    server = parse_decode_config("FullAttnMultiBlock", FAMILY[family], {})
    options = {"algorithm": request.algorithm, **request.options}
    decoding, length = server.resolve(options), request.length
    template = template_of(request.template)
    if template is not None:
        parts = CanvasParts(tuple(template), length)
        length = parts.decoded_len(decoding.block_size)
    return decoding.finalized(length, facts_of(family))


def template_of(given: tuple[int | None, ...] | None) -> list[int] | None:
    """The references' template as a canvas takes it."""
    return given and [-1 if token is None else token for token in given]


class Memory:
    """The token with which each position of a canvas was last computed.

    It stands for cached keys and values: these logits depend on tokens alone.
    """

    def __init__(self, model: ToyModel, length: int) -> None:
        self.model, self.ids = model, torch.full((length,), -1)

    def forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits of the recomputed positions, ``start`` and what follows."""
        end = start + len(ids)
        self.ids[start:end] = ids
        return self.model(self.ids)[start:end]


def held(table: torch.Tensor) -> Logits:
    """Logits ``(N, V)`` that are there."""
    return Logits(len(table), table.shape[1], lambda rows: table[rows])


def decode(family: str, requests: Sequence[Request]) -> list[Canvas]:
    """All requests in one batch, until each canvas is full."""
    return run_canvases(family, [], requests)


def run_canvases(
    family: str,
    made: Sequence[tuple[ToyModel, Canvas, Decoding]],
    requests: Sequence[Request],
) -> list[Canvas]:
    """Canvases that a test has made, then those of requests, in one batch."""
    facts = facts_of(family)
    denoiser, canvases = Denoiser(facts), []
    memories: dict[tuple[int, bool], Memory] = {}
    made = [*made, *(canvas_of(family, request) for request in requests)]
    for model, canvas, decoding in made:
        denoiser.join(denoiser.prepare(canvas, decoding))
        canvases.append(canvas)
        for is_uncond in (False, True):
            memories[id(canvas), is_uncond] = Memory(model, len(canvas))
    denoiser.sync()
    denoiser.remove([canvas for canvas in canvases if canvas.done])
    while denoiser.canvases:
        packed = denoiser.pack()
        num_own = len(packed.windows) - packed.num_uncond
        ids = packed.input_ids.split(packed.lens)
        logits = torch.cat(
            [
                memories[id(canvas), index >= num_own].forward(ids[index], window.start)
                for index, (window, canvas) in enumerate(
                    zip(packed.windows, packed.canvases, strict=True)
                )
            ]
        )
        denoiser.commit(held(logits[packed.logits_indices]))
        denoiser.sync()
        assert not any(canvas.failure for canvas in canvases)
        denoiser.remove([canvas for canvas in canvases if canvas.done])
    return canvases


def canvas_of(
    family: str, request: Request, *, ends_at_eos: bool = False
) -> tuple[ToyModel, Canvas, Decoding]:
    """The canvas of a request, and how it is decoded."""
    decoding = resolve(family, request)
    canvas = decoding.new_canvas(
        request.prompt,
        request.length,
        facts_of(family),
        template=template_of(request.template),
        sampling=request.sampling,
        ignore_eos=request.ignore_eos,
        ends_at_eos=ends_at_eos,
        edits=request.edits,
    )
    return request.model, canvas, decoding


def reference_sampling(options: SamplingOptions) -> Sampling:
    """The same sampling for the references, with our random numbers."""
    streams = {"token": Stream.TOKEN, "order": Stream.ORDER}

    def uniform(stream: str, step: int, position: int) -> float:
        numbers = [torch.tensor([n]) for n in (options.seed, step, position)]
        return float(counter_uniform(*numbers, streams[stream]))

    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        uniform=uniform,
    )


def reference_edits(edits: TokenEdits | None) -> Edits:
    """The same edits for the references."""
    if edits is None:
        return NONE
    return Edits(
        logit_bias={token: by for token, by in edits.bias if by > -math.inf},
        allowed=None if edits.allowed is None else set(edits.allowed),
        banned={token for token, by in edits.bias if by == -math.inf},
        min_tokens=edits.min_tokens,
        ends=set(edits.ends),
        words=[list(word) for word in edits.words],
    )


def answer(canvas: Canvas) -> list[int]:
    return canvas.ids[canvas.prompt_len :].tolist()


def visible(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
