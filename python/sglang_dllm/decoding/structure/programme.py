"""The most probable valid answers of many canvases, by one dynamic programme.

DINGO (arXiv 2505.23061) decodes a block of a left-to-right answer so. Here the
programme runs over whole answers, in which masks stand anywhere. The automata of all
canvases are one automaton of separate parts, so that a position costs the same number
of operations for many canvases as for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sglang_dllm.decoding.structure.automaton import TokenAutomaton


@dataclass(frozen=True)
class Part:
    """The automaton of one canvas.

    Attributes:
        start: the state in front of the first position.
        max_distance: tokens that the canvas may still grow. The state behind the last
            position has to be so near to an accepting one.
    """

    automaton: TokenAutomaton
    start: int
    length: int
    max_distance: int = 0


class Programme:
    """S canvases with Q states, E edges and C classes together, over T positions.

    Each part has one class more than its automaton, for the tokens that no state takes.

    Attributes:
        token_class: ``(S, V)`` int64, as in the automata.
        first_class: ``(S,)`` int64: where the classes of each part begin among C.
        width: the classes of the part that has the most.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        automata = [part.automaton for part in parts]
        states = _starts([one.num_states for one in automata])
        classes = _starts([one.num_classes + 1 for one in automata])
        self.num_states, self.num_classes = states[-1], classes[-1]
        self.num_positions = max(part.length for part in parts)

        def on_device(values: list[np.ndarray]) -> torch.Tensor:
            found = torch.from_numpy(np.concatenate(values))
            return found.to(device, non_blocking=True)

        self.source = on_device(
            [a.edge_source + at for a, at in zip(automata, states, strict=False)]
        )
        self.target = on_device(
            [a.edge_target + at for a, at in zip(automata, states, strict=False)]
        )
        self.of_class = on_device(
            [a.edge_class + at for a, at in zip(automata, classes, strict=False)]
        )
        self.token_class = on_device([a.token_class[None] for a in automata])
        self.first_class = on_device([np.array(classes[:-1])])
        self._owner = on_device(
            [np.full(a.num_states, i) for i, a in enumerate(automata)]
        )
        self._class_owner = on_device(
            [np.full(a.num_classes + 1, i) for i, a in enumerate(automata)]
        )
        self._length = on_device([np.array([part.length for part in parts])])
        is_last = [p.automaton.distance <= p.max_distance for p in parts]
        self._is_last = on_device(is_last)
        is_first = np.zeros(self.num_states, dtype=bool)
        is_first[[p.start + at for p, at in zip(parts, states, strict=False)]] = True
        self._is_first = on_device([is_first])
        self.num_parts = len(parts)
        self.width = max(one.num_classes + 1 for one in automata)

    @cached_property
    def _active(self) -> torch.Tensor:
        """``(T, Q)`` bool: the position is one of the state's canvas."""
        at = torch.arange(self.num_positions, device=self._length.device)
        return at[:, None] < self._length[self._owner]

    def open_classes(self, ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """``(T, C)`` bool: the classes of the tokens that a position may have.

        Args:
            ids: ``(S, T)`` int64: the answers.
            masked: ``(S, T)`` bool: any token may be there.
        """
        there = self.token_class.gather(1, ids) + self.first_class[:, None]
        found = masked.T[:, self._class_owner]
        return found.scatter(1, there.T, True)

    def possible(self, open_classes: torch.Tensor) -> torch.Tensor:
        """``(T, C)`` bool: the classes that some valid answer has at each position.

        Args:
            open_classes: ``(T, C)`` bool.
        """
        active = self._active
        ahead = [self._is_first]
        for at in range(self.num_positions - 1):
            taken = ahead[at][self.source] & open_classes[at][self.of_class]
            found = torch.zeros_like(self._is_first)
            found = _any(found, self.target, taken)
            ahead.append(torch.where(active[at], found, ahead[at]))
        behind, possible = self._is_last, [self._is_last] * self.num_positions
        nothing = torch.zeros_like(open_classes[0])
        for at in reversed(range(self.num_positions)):
            taken = behind[self.target] & open_classes[at][self.of_class]
            taken &= active[at][self.source]
            is_used = taken & ahead[at][self.source]
            possible[at] = _any(nothing, self.of_class, is_used)
            found = _any(torch.zeros_like(behind), self.source, taken)
            behind = torch.where(active[at], found, behind)
        return torch.stack(possible)

    def best_classes(self, scores: torch.Tensor) -> torch.Tensor:
        """``(S, T)`` int64: the classes of the valid answer with the greatest sum.

        They count from each part's first class. The first edges win among equal
        sums. Without a valid answer they are any classes.

        Args:
            scores: ``(T, C)`` float64, minus infinity where a class is not open.
        """
        num_edges, active = len(self.source), self._active
        edge = torch.arange(num_edges, device=scores.device)
        lowest = torch.full(
            (self.num_states,), -torch.inf, dtype=torch.float64, device=scores.device
        )
        best = lowest.masked_fill(self._is_first, 0.0)
        back: list[torch.Tensor] = []
        for at in range(self.num_positions):
            sums = best[self.source] + scores[at][self.of_class]
            found = lowest.scatter_reduce(0, self.target, sums, "amax")
            is_best = (sums == found[self.target]) & (sums > -torch.inf)
            first = torch.where(is_best, edge, num_edges)
            none = torch.full_like(self._owner, num_edges)
            came = none.scatter_reduce(0, self.target, first, "amin")
            back.append(torch.where(active[at], came, num_edges))
            best = torch.where(active[at], found, best)
        state = self._best_last(best)
        source = torch.nn.functional.pad(self.source, (0, 1))
        of_class = torch.nn.functional.pad(self.of_class, (0, 1))
        path: list[torch.Tensor] = []
        for came in reversed(back):
            at_edge = came[state]
            path.append(of_class[at_edge])
            state = torch.where(at_edge < num_edges, source[at_edge], state)
        found = torch.stack(path[::-1], dim=1) - self.first_class[:, None]
        return found.clamp(min=0)

    def _best_last(self, best: torch.Tensor) -> torch.Tensor:
        """``(S,)`` int64: the state behind each answer, the first of equal ones."""
        sums = best.masked_fill(~self._is_last, -torch.inf)
        most = sums.new_full((self.num_parts,), -torch.inf)
        most = most.scatter_reduce(0, self._owner, sums, "amax")
        state = torch.arange(self.num_states, device=best.device)
        # A part without a valid answer gets its own first state.
        state = torch.where(sums == most[self._owner], state, self.num_states)
        first = torch.full_like(most, self.num_states, dtype=torch.int64)
        return first.scatter_reduce(0, self._owner, state, "amin")


def _starts(sizes: Sequence[int]) -> list[int]:
    """The begins of some ranges, and the end of the last one."""
    return [0, *np.cumsum(sizes).tolist()]


def _any(start: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``start`` with True where a value of that index is True."""
    return start.int().index_add(0, at, values.int()) > 0
