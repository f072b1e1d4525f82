"""A model that says what a test tells it to, with confidences exact in binary.

Random logits rarely land on a threshold or tie; these do.
"""

from __future__ import annotations

from typing import Any

import torch

from helpers.toy_model import MASK, TURN_END, VOCAB, Request, ToyModel, answer
from helpers.toy_model import decode as decode_batch
from sglang_dllm.decoding.canvas import SamplingOptions

JUNK = 9
WORDS = (0, 1, 2, 4, 8, JUNK, 10, TURN_END)
MOST_FORWARDS = 300
"""More than any case needs: steps that commit nothing end in a failure, not a hang."""


def even(num: int) -> torch.Tensor:
    """(V,): the first words equally likely, nothing else: confidence 1 / num."""
    logits = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
    logits[list(WORDS[:num])] = 0.0
    return logits


def peak(*tokens: tuple[int, float]) -> torch.Tensor:
    """(V,) log probabilities: the given ones, the rest shared by the other tokens."""
    given = dict(tokens)
    rest = (1 - sum(given.values())) / (VOCAB - len(given))
    return torch.tensor([given.get(i, rest) for i in range(VOCAB)]).double().log()


def word(*confidences: float) -> list[torch.Tensor]:
    return [peak((1, c)) for c in confidences]


class ScriptedModel(ToyModel):
    """One frame per forward, the last one for ever: a row for each answer position.

    Rows that predict no answer position say JUNK. A canvas whose prompt is masked gets
    the `blind` frame.
    """

    def __init__(
        self,
        family: str,
        *frames: list[torch.Tensor],
        blind: list[torch.Tensor] | None = None,
    ) -> None:
        self.family, self.frames, self.blind = family, frames, blind
        self.seen: list[list[int]] = []
        self.seen_blind: list[list[int]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        frame = self.frames[min(len(self.seen), len(self.frames) - 1)]
        num_prompt = len(ids) - len(frame)
        if self.blind is not None and len(self.seen) > len(self.seen_blind):
            frame = self.blind
            self.seen_blind.append(ids.tolist())
        else:
            self.seen.append(ids.tolist())
            assert len(self.seen) < MOST_FORWARDS, "the steps commit nothing"
        junk = peak((JUNK, 0.999))
        rows = [*[junk] * num_prompt, *frame]
        if self.family == "dream":
            rows = [*rows[1:], junk]
        return torch.stack(rows)


def decode(
    model: ScriptedModel,
    algorithm: str,
    sampling: SamplingOptions | None = None,
    ignore_eos: bool = False,
    **options: Any,
) -> tuple[list[int], list[list[int]]]:
    """The answer, and the answer positions that each forward committed."""
    request = Request(
        model,
        (1,),
        len(model.frames[0]),
        algorithm,
        options,
        sampling or SamplingOptions(),
        ignore_eos,
    )
    (canvas,) = decode_batch(model.family, [request])
    left = [
        {i for i, token in enumerate(ids[1:]) if token == MASK} for ids in model.seen
    ]
    steps = [sorted(a - b) for a, b in zip(left, [*left[1:], set()], strict=True)]
    return answer(canvas), steps


def steps_of(
    model: ScriptedModel, algorithm: str, *args: Any, **options: Any
) -> list[Any]:
    return decode(model, algorithm, *args, **options)[1]


def first_steps(
    family: str, algorithm: str, *crowd: tuple[ScriptedModel, Any], sampling: Any = None
) -> list[Any]:
    """The positions that the first forward of a batch commits, by canvas.

    Args:
        crowd: the model and the options of each request.
    """
    draws = sampling or SamplingOptions()
    requests = [
        Request(model, (1,), len(model.frames[0]), algorithm, options, draws)
        for model, options in crowd
    ]
    decode_batch(family, requests)
    seen = [model.seen[1][1:] for model, _ in crowd]
    return [[i for i, token in enumerate(ids) if token != MASK] for ids in seen]
