"""The loops of the programme, as machine code.

A position has some hundred arcs, and each of them needs a few additions and compares.
Numpy takes longer to begin an operation than the processor takes for all of it. Numba
comes with SGLang. Its import takes half a second and the first call some seconds, or
half a second from its cache on disk: so forms alone import this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from sglang_dllm.decoding.structure.arcs import Arcs, Bools, Ints

Floats = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function in its first call. Other threads run beside its calls."""
    try:
        found = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written
        found = njit(nogil=True)(function)
    return cast(Callable[P, R], found)


@_compiled
def _arcs_at(arcs: Arcs, state: int, of_class: int) -> tuple[int, int]:
    """The first arc of a state for a class, -1 for any, and the end of its arcs."""
    if of_class < 0:
        return arcs.begin[state], arcs.begin[state + 1]
    key = state * arcs.width + of_class
    at = np.searchsorted(arcs.edge_key, key)
    arc = arcs.begin[-1] + at
    is_there = at < len(arcs.edge_key) and arcs.edge_key[at] == key
    return arc, arc + 1 if is_there else arc


@_compiled
def find_possible(
    arcs: Arcs,
    state: int,
    classes: Ints,
    room: int,
    possible: Bools,
) -> tuple[Bools, Bools]:
    """The states and the classes of all valid answers of one strip.

    Args:
        arcs: of the automaton.
        state, classes: those of the strip; its state is not None.
        room: the positions of the strip and those behind.
        possible: ``(n, C)``, false: the classes of each of the n masks are written
            there.

    Returns:
        ``(W + 1, Q)``: the states in front of each position, and behind the last one.
        ``(W, L)``: the labels at each mask.
    """
    width_of_strip = len(classes)
    lives = np.zeros((width_of_strip + 1, len(arcs.distance)), dtype=np.bool_)
    used = np.zeros((width_of_strip, len(arcs.label_begin) - 1), dtype=np.bool_)
    lives[0, state] = arcs.distance[state] <= room
    longest = arcs.distance[arcs.begin[1:] > arcs.begin[:-1]].max()
    # In front of these positions are the states of the mask before. With a mask and
    # room, they lead back to themselves: most positions of a long strip cost nothing.
    is_loop = np.zeros(width_of_strip + 1, dtype=np.bool_)
    for at in range(width_of_strip):
        left = room - at - 1
        is_free = classes[at] < 0 and left >= longest
        if is_loop[at] and is_free:
            lives[at + 1] = lives[at]
            is_loop[at + 1] = True
            continue
        for source in range(len(arcs.distance)):
            if lives[at, source]:
                first, end = _arcs_at(arcs, source, classes[at])
                for arc in range(first, end):
                    if arcs.distance[arcs.target[arc]] <= left:
                        lives[at + 1, arcs.target[arc]] = True
        is_loop[at + 1] = is_free and np.array_equal(lives[at], lives[at + 1])
    row, is_same = len(possible), False
    for at in range(width_of_strip - 1, -1, -1):
        is_mask = classes[at] < 0
        if is_mask:
            row -= 1
        if is_same and is_loop[at + 1]:
            lives[at] = lives[at + 1]
            used[at] = used[at + 1]
            possible[row] = possible[row + 1]
            continue
        for source in range(len(arcs.distance)):
            if lives[at, source]:
                # A token that is committed behind may leave dead ends.
                lives[at, source] = False
                first, end = _arcs_at(arcs, source, classes[at])
                for arc in range(first, end):
                    if lives[at + 1, arcs.target[arc]]:
                        lives[at, source] = True
                        if is_mask:
                            used[at, arcs.label[arc]] = True
        for one in range(len(arcs.label_begin) - 1):
            if used[at, one]:
                for entry in range(arcs.label_begin[one], arcs.label_begin[one + 1]):
                    possible[row, arcs.label_class[entry]] = True
        is_same = is_mask and is_loop[at] and np.array_equal(lives[at], lives[at + 1])
    return lives, used


@_compiled
def keep_sure(
    arcs: Arcs,
    state: int,
    classes: Ints,
    lives: Bools,
    sure: Ints,
    scores: Floats,
) -> None:
    """Keep sure classes, from left to right, wherever a valid answer has them.

    Args:
        arcs, state, classes, lives: as in ``find_best``.
        sure: ``(n,)``: the sure class of each mask, -1 for none.
        scores: ``(n, C)``: the other classes of a mask whose sure class is kept get
            minus infinity.
    """
    if not lives[0, state]:
        return
    before = np.zeros(len(arcs.distance), dtype=np.bool_)
    behind = np.zeros(len(arcs.distance), dtype=np.bool_)
    before[state] = True
    row = 0
    for at in range(len(classes)):
        is_mask = classes[at] < 0
        wanted = sure[row] if is_mask else classes[at]
        while True:
            behind[:] = False
            for source in range(len(before)):
                if before[source]:
                    first, end = _arcs_at(arcs, source, wanted)
                    for arc in range(first, end):
                        if lives[at + 1, arcs.target[arc]]:
                            behind[arcs.target[arc]] = True
            if behind.any():
                break
            wanted = -1
        if is_mask:
            if wanted >= 0:
                score = scores[row, wanted]
                scores[row] = -np.inf
                scores[row, wanted] = score
            row += 1
        before, behind = behind, before


@_compiled
def find_best(
    arcs: Arcs,
    state: int,
    classes: Ints,
    lives: Bools,
    used: Bools,
    scores: Floats,
    found: Ints,
) -> None:
    """The valid answer of one strip with the best sum; the first one among equals.

    Args:
        arcs, state, classes: as in ``find_possible``.
        lives, used: what that has returned.
        scores: ``(n, C)``, of the masks.
        found: ``(n,)``: the class of each mask is written there, if there is an answer.
    """
    if not lives[0, state]:
        return
    width_of_strip, num_states = len(classes), len(arcs.distance)
    label_begin, label_class = arcs.label_begin, arcs.label_class
    best = np.empty((width_of_strip, num_states), dtype=np.int32)
    value, before = np.zeros(num_states), np.zeros(num_states)
    value[~lives[width_of_strip]] = -np.inf
    worth = np.zeros(len(label_begin) - 1)
    row = len(found)
    for at in range(width_of_strip - 1, -1, -1):
        is_mask = classes[at] < 0
        if is_mask:
            row -= 1
            for one in range(len(worth)):
                if used[at, one]:
                    worth[one] = scores[row, label_class[label_begin[one]]]
                    for entry in range(label_begin[one] + 1, label_begin[one + 1]):
                        worth[one] = max(worth[one], scores[row, label_class[entry]])
        before[:] = -np.inf
        for source in range(num_states):
            if lives[at, source]:
                first, end = _arcs_at(arcs, source, classes[at])
                chosen, most = first, -np.inf
                for arc in range(first, end):
                    score = worth[arcs.label[arc]] if is_mask else 0.0
                    score += value[arcs.target[arc]]
                    if score > most:
                        chosen, most = arc, score
                best[at, source], before[source] = chosen, most
        value, before = before, value
    for at in range(width_of_strip):
        arc = best[at, state]
        state = arcs.target[arc]
        if classes[at] < 0:
            one = arcs.label[arc]
            first, end = label_begin[one], label_begin[one + 1]
            entry = first
            for other in range(first + 1, end):
                if scores[row, label_class[other]] > scores[row, label_class[entry]]:
                    entry = other
            found[row] = label_class[entry]
            row += 1
