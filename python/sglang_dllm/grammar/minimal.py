"""The equal states of an automaton.

Refinement alone takes as many rounds as the longest text has bytes. So states are
numbered from the last ones on: a state outside of all loops is known by its targets.
A loop is refined in a few rounds, or cut open at its first state. A loop that was cut
may keep equal states apart, which costs time and changes no answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from sglang_dllm.grammar.work import Work

_ROUNDS = 32


def equal_states(
    table: npt.NDArray[np.int32], accepting: npt.NDArray[np.bool_], work: Work
) -> npt.NDArray[np.int64]:
    """Numbers of the states.

    Args:
        table: ``(Q, C)``: the state behind each column, -1 for none.
        accepting: ``(Q,)``.

    Returns:
        ``(Q,)``: states with one number accept the same texts. A state from which no
        accepting one can be reached has -1.

    Raises:
        FormError: it takes too much work.
    """
    work.spend(table.size // 16)
    numbers = _Numbers(table, accepting, work)
    numbers.give(range(len(table)))
    return numbers.label[:-1]


class _Numbers:
    def __init__(
        self,
        table: npt.NDArray[np.int32],
        accepting: npt.NDArray[np.bool_],
        work: Work,
    ) -> None:
        self.table, self.accepting, self.work = table, accepting, work
        # The last entry is that of no state, which the table has as -1.
        self.label = np.full(len(table) + 1, -1, dtype=np.int64)
        self.targets = [tuple({*row} - {-1}) for row in table.tolist()]
        self.known: dict[tuple[bool, bytes], int] = {}
        self.num = 0
        rng = np.random.default_rng(0)
        self.weights = rng.integers(1, 1 << 62, size=table.shape[1] + 1, dtype=np.int64)

    def give(self, states: Collection[int]) -> None:
        """Number states, whose targets are numbered or among them."""
        self.work.spend(4 * len(states))
        for members in _components(states, self.targets):
            first = members[0]
            if len(members) == 1 and first not in self.targets[first]:
                self._give_one(first)
            elif self._is_alive(members) and not self._refine(members):
                self._cut(members)

    def _is_alive(self, members: list[int]) -> bool:
        behind = self.label[self.table[members]]
        return bool(self.accepting[members].any() or (behind >= 0).any())

    def _key(self, state: int) -> tuple[bool, bytes]:
        return bool(self.accepting[state]), self.label[self.table[state]].tobytes()

    def _give_one(self, state: int) -> None:
        if self._is_alive([state]):
            self.label[state] = self.known.setdefault(self._key(state), self.num)
            self.num = max(self.num, int(self.label[state]) + 1)

    def _refine(self, members: list[int]) -> bool:
        """Number the states of loops by refinement; False if it takes many rounds."""
        states = np.array(members)
        rows = self.table[states]
        _, local = np.unique(self.accepting[states], return_inverse=True)
        for _ in range(_ROUNDS):
            self.work.spend(rows.size // 32 + 32)
            self.label[states] = self.num + local
            with np.errstate(over="ignore"):
                mixed = ((self.label[rows] + 2) * self.weights[:-1]).sum(axis=1)
                mixed += local * self.weights[-1]
            _, found = np.unique(mixed, return_inverse=True)
            if found.max() == local.max():
                self.num += int(local.max()) + 1
                for state in members:
                    self._remember(state)
                return True
            local = found
        self.label[states] = -1
        return False

    def _cut(self, members: list[int]) -> None:
        first = min(members)
        self.label[first] = self.num
        self.num += 1
        self.give([state for state in members if state != first])
        self._remember(first)

    def _remember(self, state: int) -> None:
        """A state in front of a loop may equal one of the loop."""
        self.known.setdefault(self._key(state), int(self.label[state]))


def _components(
    states: Collection[int], targets: list[tuple[int, ...]]
) -> Iterator[list[int]]:
    """Tarjan's algorithm: the states that lead to each other, the last ones first."""
    left = set(states)
    seen: dict[int, int] = {}
    lowest: dict[int, int] = {}
    place: dict[int, int] = {}
    open_states: list[int] = []
    for root in states:
        if root in seen:
            continue
        path = [(root, iter(targets[root]))]
        seen[root] = lowest[root] = len(seen)
        place[root] = len(open_states)
        open_states.append(root)
        while path:
            state, others = path[-1]
            for other in others:
                if other not in left:
                    continue  # of another part, or of a component that is complete
                if other not in seen:
                    seen[other] = lowest[other] = len(seen)
                    place[other] = len(open_states)
                    open_states.append(other)
                    path.append((other, iter(targets[other])))
                    break
                lowest[state] = min(lowest[state], seen[other])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[state])
                if lowest[state] == seen[state]:
                    members = open_states[place[state] :]
                    del open_states[place[state] :]
                    left.difference_update(members)
                    yield members
