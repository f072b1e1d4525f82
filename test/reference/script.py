"""A model that says what a test tells it to: recorded logits over eight tokens."""

from __future__ import annotations

from typing import Any

import torch

from reference.algorithms import run
from reference.canvas import GREEDY, Sampling
from reference.decoding import Result

# Tokens 0 to 3 are words.
NEWLINE, TURN_END, EOS, MASK, VOCAB = 4, 5, 6, 7, 8
Peak = tuple[int, float]  # token, probability


def row(*peaks: Peak) -> torch.Tensor:
    """(V,) log probabilities: the given ones, the rest shared by the other tokens."""
    given = dict(peaks)
    rest = (1 - sum(given.values())) / (VOCAB - len(given))
    probs = [given.get(token, rest) for token in range(VOCAB)]
    return torch.tensor(probs, dtype=torch.float64).log()


class Script:
    """One frame per forward, the last one for ever: a peak or a ready row each."""

    mask_id, eos_id, turn_end_id, delimiter_ids = MASK, EOS, TURN_END, (NEWLINE,)

    def __init__(self, family: str, *frames: list[Any], prompt_len: int = 0) -> None:
        self.family, self.prompt_len = family, prompt_len
        self.frames = [
            [row(p) if isinstance(p, tuple) else p for p in frame] for frame in frames
        ]
        self.seen: list[list[int]] = []  # the canvas of each forward

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, 8) float64."""
        frame = self.frames[min(len(self.seen), len(self.frames) - 1)]
        self.seen.append(ids.tolist())
        prompt = [torch.zeros(VOCAB, dtype=torch.float64)] * self.prompt_len
        return torch.stack([*prompt, *frame])


def says(
    family: str, *confidences: float, token: int = 1, prompt_len: int = 0
) -> Script:
    """Always the same token, with these confidences from the first to the last."""
    return Script(family, [(token, c) for c in confidences], prompt_len=prompt_len)


def decode(
    algorithm: str, model: Script, sampling: Sampling = GREEDY, **options: Any
) -> tuple[Result, list[list[int]]]:
    """Result, and the positions each forward committed: all, and none twice."""
    prompt, length = [0] * model.prompt_len, len(model.frames[0])
    result = run(algorithm, model, prompt, length, options, sampling)
    steps = [step.committed for step in result.trace]
    written = sorted(i for step in steps for i in step)
    if written != [*range(length)] or result.nfe != len(steps):
        raise AssertionError(f"{result.nfe} forwards committed {steps}")
    return result, steps


def sizes(steps: list[list[int]]) -> list[int]:
    return [len(step) for step in steps]
