"""Toy models over eight tokens: one says what a test tells it to, one is random."""

from __future__ import annotations

from typing import Any

import torch

from reference.algorithms import run
from reference.canvas import GREEDY, Sampling
from reference.memory import LogitsFn, usable_rows
from reference.record import Result

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

    mask_id, eos_id, eot_token_id, delimiter_ids = MASK, EOS, TURN_END, (NEWLINE,)

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

    def new_memory(self) -> ScriptMemory:
        return ScriptMemory(self)


class ScriptMemory:
    """A script decoded with a cache: what is outside of the window is not said."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        return self.script(ids)

    def window(self, ids: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        shift = self.script.family == "dream"
        said = usable_rows(torch.ones(hi - lo, 1), lo, len(ids), shift)
        return self.script(ids) * said  # 1 or NaN


def random_rows(seed: int) -> LogitsFn:
    """Uneven logits that depend on the whole canvas, for `reference.memory`."""

    def rows(ids: torch.Tensor) -> torch.Tensor:
        """ids: (L,) int64 -> (L, 8) float32, not shifted."""
        rng = torch.Generator().manual_seed(hash((seed, *ids.tolist())) % 2**31)
        scale = torch.exp(1.5 * torch.randn(len(ids), 1, generator=rng))
        return torch.randn(len(ids), VOCAB, generator=rng) * scale

    return rows


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
