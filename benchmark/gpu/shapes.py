"""The model folder, the sizes to measure, and the requests that produce them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.dummy_checkpoint import write_llada
from benchmark.gpu.roofline import LLADA_8B, ModelShape, Work

ROUND = 4
"""Forwards of one round of the server. A run has whole rounds."""

FULL_ANSWER = 64
"""Masks behind the prompt of a case of full windows."""

DEFAULT_ALGORITHM = "LLaDA"


@dataclass(frozen=True)
class Case:
    """One forward: a window of each of ``batch`` canvases of ``context`` tokens.

    The answer is one block, so that with a cache only the first and the last forward of
    a request are full. A forward commits one mask and ``max_forwards`` ends the
    request, so that the number of forwards is known.
    """

    window: int
    context: int
    batch: int

    @property
    def is_full(self) -> bool:
        return self.window == self.context

    @property
    def name(self) -> str:
        what = (
            f"full canvas {self.context}"
            if self.is_full
            else f"window {self.window} context {self.context}"
        )
        return f"{what} batch {self.batch}"

    @property
    def answer_len(self) -> int:
        return min(FULL_ANSWER, self.context // 2) if self.is_full else self.window

    @property
    def forwards(self) -> tuple[int, int]:
        """Forwards of the short run, and the most of the long run.

        Requests that are sent together may start a round apart. The difference of the
        two runs cancels that if the short run has more than one round.
        """
        short = 2 * ROUND if not self.is_full and self.answer_len >= 32 else ROUND
        longest = min(self.answer_len - ROUND, short + (16 if self.is_full else 36))
        return short, longest // ROUND * ROUND

    def work(self, short: int, long: int) -> Work:
        """The mean work of the forwards that only the long run has."""
        masks = self.answer_len + 1 - (short + 1 + long) / 2
        return Work(self.window, self.context, masks, self.batch)

    def tokens_computed(self, forwards: int) -> int:
        """The ``tokens_computed`` that ``meta_info`` must have."""
        if self.is_full:
            return forwards * self.context
        return 2 * self.context + (forwards - 2) * self.window

    def sampling(self, forwards: int) -> dict[str, Any]:
        """``sampling_params`` of a request that runs ``forwards`` forwards."""
        options = {
            "algorithm": DEFAULT_ALGORITHM,
            "block_size": self.answer_len,
            "steps": self.answer_len,
            "max_forwards": forwards,
            "cache": "none" if self.is_full else "dual",
        }
        return {
            "max_new_tokens": self.answer_len,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"dllm": options},
        }


@dataclass(frozen=True)
class Sizes:
    """The cases of a run. The goals come first, in case the time runs out."""

    goals: tuple[Case, ...]
    others: tuple[Case, ...]

    def __iter__(self) -> Iterator[Case]:
        yield from self.goals
        yield from self.others

    @property
    def most_tokens(self) -> int:
        return max(case.context * case.batch for case in self)

    @property
    def most_requests(self) -> int:
        return max(case.batch for case in self)


FULL_512 = Case(512, 512, 1)
WINDOW_64 = Case(64, 512, 1)
WINDOW_64_X16 = Case(64, 512, 16)


def sizes_of(
    canvases: tuple[int, ...],
    windows: tuple[int, ...],
    context: int,
    batches: tuple[int, ...],
    goals: tuple[Case, ...],
    quick: bool,
) -> Sizes:
    """All combinations. A quick run has the goals alone."""
    shapes = [(size, size) for size in canvases] + [(size, context) for size in windows]
    cases = [Case(*shape, batch) for batch in batches for shape in shapes]
    others = [] if quick else [case for case in cases if case not in goals]
    return Sizes(goals, tuple(others))


def gpu_sizes(quick: bool) -> Sizes:
    goals = (FULL_512, WINDOW_64, WINDOW_64_X16)
    return sizes_of((256, 512, 1024), (32, 64, 128), 512, (1, 4, 16), goals, quick)


def cpu_sizes(quick: bool) -> Sizes:
    goals = (Case(64, 64, 1), Case(32, 64, 1), Case(32, 64, 4))
    return sizes_of((32, 64), (16, 32), 64, (1, 4), goals, quick)


def gpu_shape(layers: int | None, hidden: int | None) -> ModelShape:
    """LLaDA-8B's shape, or a smaller one: heads of 128, an MLP of three widths."""
    hidden, base = hidden or LLADA_8B.hidden, LLADA_8B
    heads = max(1, hidden // base.head_dim)
    return ModelShape(
        layers or base.layers, hidden, heads, heads, 3 * hidden, base.vocab, 2
    )


def cpu_shape(layers: int | None, hidden: int | None) -> ModelShape:
    """A tiny shape in float32."""
    hidden = hidden or 64
    heads = max(1, hidden // 16)
    return ModelShape(layers or 2, hidden, heads, heads, 3 * hidden, 512, 4)


def write_model(folder: Path, shape: ModelShape) -> Path:
    """Write a LLaDA folder without weights and return it."""
    dtype = "bfloat16" if shape.dtype_bytes == 2 else "float32"
    sizes = {k: v for k, v in asdict(shape).items() if k != "dtype_bytes"}
    return write_llada(folder, **sizes, dtype=dtype)
