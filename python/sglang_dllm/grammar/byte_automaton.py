"""A deterministic automaton over bytes from the rules of a grammar.

A rule that refers to itself in its last place becomes a loop. Other recursion is
unrolled: the automaton accepts the answers that nest no deeper than ``MAX_DEPTH``,
and no others. So every answer that it accepts satisfies the grammar.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_dllm.grammar.ebnf import (
    Characters,
    Choice,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.utf8 import Range, byte_ranges

MAX_DEPTH = 4
"""How often a rule may be inside of itself."""

MAX_STATES = 20_000
"""States of the automaton before it is made smaller."""

MAX_SECONDS = 0.9
"""The processor time that one form may take to be read."""

_MAX_PARTS = 200_000
_DEAD = 0
_ACCEPT = 1


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """
    Attributes:
        next_state: ``(Q, 256)`` int32: the state behind each byte, -1 for none. State
            0 is the start. From each state an accepting one can be reached.
        accepting: ``(Q,)`` bool.
    """

    next_state: npt.NDArray[np.int32]
    accepting: npt.NDArray[np.bool_]


def byte_automaton(rules: Rules) -> ByteAutomaton:
    """The automaton of the rule ``root``.

    Raises:
        FormError: it has too many states, takes too long, or accepts nothing.
    """
    deadline = time.thread_time() + MAX_SECONDS
    parts = _Parts(rules, deadline)
    start = parts.rule("root", _ACCEPT)
    return _minimal(*_deterministic(parts, start, deadline))


class _Parts:
    """A nondeterministic automaton; each part is made with the state behind it."""

    def __init__(self, rules: Rules, deadline: float) -> None:
        self.rules, self._deadline = rules, deadline
        self.jumps: list[list[int]] = [[], []]
        self.edges: list[list[tuple[int, int, int]]] = [[], []]
        self._rules_made: dict[tuple[str, int], int] = {}
        self._inside: Counter[str] = Counter()

    def new(self) -> int:
        if len(self.jumps) >= _MAX_PARTS or time.thread_time() > self._deadline:
            raise _too_large()
        self.jumps.append([])
        self.edges.append([])
        return len(self.jumps) - 1

    def rule(self, name: str, behind: int) -> int:
        made = self._rules_made.get((name, behind))
        if made is not None:
            return made
        if name not in self.rules:
            raise FormError(f"the grammar refers to a rule that it lacks: {name}")
        if self._inside[name] > MAX_DEPTH:
            return _DEAD
        self._rules_made[name, behind] = start = self.new()
        self._inside[name] += 1
        try:
            self.jumps[start].append(self.node(self.rules[name], behind))
        except RecursionError:
            raise _too_large() from None
        self._inside[name] -= 1
        return start

    def node(self, node: Node, behind: int) -> int:
        # Here too: repetitions of nothing make no parts.
        if time.thread_time() > self._deadline:
            raise _too_large()
        if behind == _DEAD:
            return _DEAD
        match node:
            case Text(text):
                try:
                    data = text.encode()
                except UnicodeEncodeError:
                    raise FormError("it has half of a surrogate pair") from None
                return self.ranges([(byte, byte) for byte in data], behind)
            case Characters(ranges):
                start = self.new()
                for found in byte_ranges(ranges):
                    self.jumps[start].append(self.ranges(list(found), behind))
                return start
            case Rule(name):
                return self.rule(name, behind)
            case Sequence(parts):
                for part in reversed(parts):
                    behind = self.node(part, behind)
                return behind
            case Choice(parts):
                start = self.new()
                self.jumps[start] += [self.node(part, behind) for part in parts]
                return start
            case Repeat(part, least, most):
                return self.repeat(part, least, most, behind)

    def repeat(self, part: Node, least: int, most: int | None, behind: int) -> int:
        if most is None:
            loop = self.new()
            self.jumps[loop] += [behind, self.node(part, loop)]
            behind = loop
        else:
            end = behind
            for _ in range(most - least):
                start = self.new()
                self.jumps[start] += [end, self.node(part, behind)]
                behind = start
        for _ in range(least):
            behind = self.node(part, behind)
        return behind

    def ranges(self, ranges: list[Range], behind: int) -> int:
        for low, high in reversed(ranges):
            start = self.new()
            self.edges[start].append((low, high, behind))
            behind = start
        return behind


def _deterministic(
    parts: _Parts, start: int, deadline: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Sets of parts as states, with every byte of a class in one column."""
    bounds = {0, 256}
    for edges in parts.edges:
        for low, high, _ in edges:
            bounds |= {low, high + 1}
    starts = sorted(bounds)[:-1]
    column_of = {byte: column for column, byte in enumerate(starts)}
    ends = {byte: column for column, byte in enumerate(sorted(bounds))}
    closures: dict[int, frozenset[int]] = {}

    def closure(part: int) -> frozenset[int]:
        if part not in closures:
            found, left = {part}, [part]
            while left:
                for other in parts.jumps[left.pop()]:
                    if other not in found:
                        found.add(other)
                        left.append(other)
            # Parts without an edge of their own have done their work.
            closures[part] = frozenset(
                one for one in found if parts.edges[one] or one == _ACCEPT
            )
        return closures[part]

    first = closure(start)
    number = {first: 0}
    waiting = deque([first])
    rows = []
    while waiting:
        if len(number) > MAX_STATES or time.thread_time() > deadline:
            raise _too_large()
        here = waiting.popleft()
        targets: list[set[int]] = [set() for _ in starts]
        for part in here:
            for low, high, behind in parts.edges[part]:
                for column in range(column_of[low], ends[high + 1]):
                    targets[column] |= closure(behind)
        row = np.full(len(starts), -1, dtype=np.int32)
        for column, found in enumerate(targets):
            if found:
                key = frozenset(found)
                if key not in number:
                    number[key] = len(number)
                    waiting.append(key)
                row[column] = number[key]
        rows.append(row)
    table = np.stack(rows)
    accepting = np.array([_ACCEPT in found for found in number])
    column_of_byte = np.searchsorted(starts, np.arange(256), side="right") - 1
    return table[:, column_of_byte], accepting


def _minimal(
    table: npt.NDArray[np.int32], accepting: npt.NDArray[np.bool_]
) -> ByteAutomaton:
    """Without states that lead nowhere, and with equal states as one."""
    alive = accepting.copy()
    while True:
        leads = np.append(alive, False)[table].any(axis=1) | alive
        if (leads == alive).all():
            break
        alive = leads
    if not alive[0]:
        raise FormError("no text has this form")
    kept = np.flatnonzero(alive)
    number = np.full(len(table) + 1, -1, dtype=np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    table, accepting = number[table[kept]], accepting[kept]
    # The bytes of one column of equal targets do the same everywhere.
    columns = np.unique(table, axis=1)
    label = accepting.astype(np.int64)
    weights = np.random.default_rng(0).integers(
        1, 1 << 62, size=columns.shape[1] + 1, dtype=np.int64
    )
    num_labels = len(np.unique(label))
    while True:
        targets = np.append(label, -1)[columns] + 1
        with np.errstate(over="ignore"):
            mixed = (targets * weights[:-1]).sum(axis=1) + label * weights[-1]
        _, label = np.unique(mixed, return_inverse=True)
        if label.max() + 1 == num_labels:
            break
        num_labels = int(label.max()) + 1
    # In the order in which the states were found, so that the start stays first.
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    label = np.append(rank[label], -1).astype(np.int32)
    chosen = first[order]
    return ByteAutomaton(label[table[chosen]].astype(np.int32), accepting[chosen])


def _too_large() -> FormError:
    return FormError(
        f"it is too large: it needs more than {MAX_STATES} states or "
        f"{MAX_SECONDS} seconds"
    )
