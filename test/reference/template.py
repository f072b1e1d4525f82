"""A canvas that a request gives in part: text between gaps of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Template = Sequence[int | None]  # of the answer: the given ids, None for a mask


class Watch(Protocol):
    """Looks at a canvas between its forwards; may raise to stop the algorithm."""

    def before(self, canvas: Any) -> None: ...

    def after(self, canvas: Any, logits: torch.Tensor) -> None:
        """logits: (L, V), usable, NaN where not computed."""
        ...


@dataclass(frozen=True)
class Part:
    """An answer that is decoded in parts (`reference.lengths`): what the part begins
    with, the mask id where nothing is committed. Committed ids are not given ones: an
    EOS among them ends the answer, but for the last `padding` ids, which end nothing.
    """

    answer: list[int]
    padding: int
    watch: Watch


def run_forward(canvas: Any, span: tuple[int, int] | None) -> torch.Tensor:
    """The usable logits (L, V) of a canvas's next forward, watched."""
    if canvas.part is not None:
        canvas.part.watch.before(canvas)
    logits = canvas.forwards.run(canvas.ids, span, canvas.masked())
    if canvas.part is not None:
        canvas.part.watch.after(canvas, logits)
    return logits


def fill_in(
    prompt_ids: list[int],
    max_new_tokens: int,
    mask_id: int,
    template: Template | None,
    part: Part | None,
) -> tuple[list[int], list[bool]]:
    """The ids of the canvas before the first forward, and which of them are given.

    A given mask id is text, in the prompt as behind it.
    """
    if part is not None:
        given = [True] * len(prompt_ids) + [False] * len(part.answer)
        return [*prompt_ids, *part.answer], given
    if template is None:
        template = [None] * max_new_tokens
    if len(template) != max_new_tokens:
        raise ValueError(f"{len(template)} positions, {max_new_tokens} asked for")
    given = [True] * len(prompt_ids) + [token is not None for token in template]
    answer = [mask_id if token is None else token for token in template]
    return [*prompt_ids, *answer], given


def behind_given(given: list[bool]) -> int:
    """The first position behind all given ones."""
    return max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)
