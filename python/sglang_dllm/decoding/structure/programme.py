"""The most probable valid answers of many canvases, by one dynamic programme.

DINGO (arXiv 2505.23061) decodes a block of a left-to-right answer so. Here masks may
stand anywhere. The programme of a canvas is over a strip of it: from the first mask to
the last position that the step may commit. The state in front of the strip is known.
Behind its end, every state is possible from which the rest of the canvas is long enough
to end the answer; the rest decides nothing else, unless a token is committed there.

All of it runs on the host. A position takes a microsecond there with the automaton of a
small schema, and the launch of a kernel on a GPU takes five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import numpy.typing as npt

from sglang_dllm.decoding.structure.arcs import Bools, Ints
from sglang_dllm.decoding.structure.automaton import TokenAutomaton

Floats = npt.NDArray[np.float64]


@cache
def _loops() -> ModuleType:
    """The loops. Their import takes half a second, which other requests do not pay."""
    from sglang_dllm.decoding.structure import loops

    return loops


@dataclass(frozen=True, eq=False)
class Strip:
    """The part of one canvas on which the programme runs: W positions.

    Attributes:
        state: in front of the first position; None where none is, because the tokens
            before are no valid answer's.
        classes: ``(W,)``: the class of the token of each position, -1 for a mask.
        behind: positions of the canvas behind the strip, and those that it may still
            grow by. All are masks.
    """

    automaton: TokenAutomaton
    state: int | None
    classes: Ints
    behind: int


class Programme:
    """S strips with R masks.

    Attributes:
        automata: of the strips, each once.
        num_classes: C: more than any class of them.
        rows: ``(S, W)``: the masks are numbered, strip by strip; -1 for others.
        form: ``(R,)``: the place of the automaton of each mask among ``automata``.
        possible: ``(R, C)``: the classes that some valid answer has at each mask. They
            are those of the automaton of its strip.
    """

    def __init__(self, strips: Sequence[Strip]) -> None:
        place = {
            automaton: at
            for at, automaton in enumerate(
                dict.fromkeys(strip.automaton for strip in strips)
            )
        }
        self.automata = list(place)
        self.num_classes = max(one.arcs.width for one in place)
        lens = [len(strip.classes) for strip in strips]
        is_mask = np.zeros((len(strips), max(lens)), dtype=bool)
        for row, strip in zip(is_mask, strips, strict=True):
            row[: len(strip.classes)] = strip.classes < 0
        self.rows = np.where(is_mask, np.cumsum(is_mask).reshape(is_mask.shape) - 1, -1)
        counts = is_mask.sum(axis=1)
        ends = np.cumsum(counts)
        self.num_rows = int(ends[-1])
        self.form = np.repeat([place[strip.automaton] for strip in strips], counts)
        self.possible: Bools = np.zeros((self.num_rows, self.num_classes), dtype=bool)
        loops = _loops()
        self._ways = []
        for strip, first, end in zip(strips, ends - counts, ends, strict=True):
            if strip.state is not None:
                rows = slice(int(first), int(end))
                room = len(strip.classes) + strip.behind
                start = (strip.automaton.arcs, strip.state, strip.classes)
                found = loops.find_possible(*start, room, self.possible[rows])
                self._ways.append((rows, (*start, *found)))

    @cached_property
    def certain(self) -> Bools:
        """``(R,)``: one token alone is possible, or nothing but an EOS."""
        found: Bools = self.possible.sum(axis=1) == 1
        (rows,) = found.nonzero()
        classes = self.possible[rows].argmax(axis=1)
        for place, automaton in enumerate(self.automata):
            some = self.form[rows] == place
            one = classes[some]
            is_one = automaton.class_size[one] == 1
            found[rows[some]] = is_one | (one == automaton.eos_class)
        return found

    def best_classes(self, scores: Floats, sure: Ints) -> Ints:
        """``(R,)``: the classes of the valid answer of each strip with the best sum.

        The first arcs win among equal sums. -1 where a strip has no valid answer.

        Args:
            scores: ``(R, C)``, finite where a class is possible; written here.
            sure: ``(R,)``: the classes that are kept, from left to right, wherever a
                valid answer has them; -1 for none.
        """
        found = np.full(self.num_rows, -1)
        for rows, (*start, lives, used) in self._ways:
            if (sure[rows] >= 0).any():
                _loops().keep_sure(*start, lives, sure[rows], scores[rows])
            _loops().find_best(*start, lives, used, scores[rows], found[rows])
        return found


def prepare(automaton: TokenAutomaton) -> None:
    """Make what the first programme of an automaton and of a process needs.

    The loops are compiled to machine code. That takes some seconds, in which a step of
    other requests must not wait.
    """
    strip = Strip(automaton, automaton.start, np.full(1, -1), automaton.min_tokens)
    programme = Programme([strip])
    sure = np.full(programme.num_rows, programme.possible[0].argmax())
    programme.best_classes(np.zeros(programme.possible.shape), sure)
