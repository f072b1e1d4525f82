"""A deterministic automaton over bytes from the rules of a grammar.

A rule that refers to itself in its last place becomes a loop. Other recursion is
unrolled: the automaton accepts the answers that nest no deeper than ``MAX_DEPTH``,
and no others. So every answer that it accepts satisfies the grammar.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_dllm.grammar.ebnf import (
    Characters,
    Choice,
    FreeText,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.free_text import states_of
from sglang_dllm.grammar.minimal import equal_states
from sglang_dllm.grammar.utf8 import Range, byte_ranges
from sglang_dllm.grammar.work import Work

MAX_DEPTH = 4
"""How often a rule may be inside of itself."""

MAX_STATES = 20_000
"""States of the automaton before it is made smaller."""

_DEAD = 0
_ACCEPT = 1


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """
    Attributes:
        next_state: ``(Q, 256)`` int32: the state behind each byte, -1 for none. State
            0 is the start. From each state an accepting one can be reached.
        accepting: ``(Q,)`` bool.
        free: the state in free text with no beginning of a trigger; None for none.
    """

    next_state: npt.NDArray[np.int32]
    accepting: npt.NDArray[np.bool_]
    free: int | None = None


def byte_automaton(rules: Rules, work: Work) -> ByteAutomaton:
    """The automaton of the rule ``root``.

    Raises:
        FormError: it has too many states, takes too much work, or accepts nothing.
    """
    parts = _Parts(rules, work)
    start = parts.rule("root", _ACCEPT)
    found = _deterministic(parts, start, work)
    return _minimal(*found, work)


class _Parts:
    """A nondeterministic automaton; each part is made with the state behind it."""

    def __init__(self, rules: Rules, work: Work) -> None:
        self.rules, self._work = rules, work
        self.jumps: list[list[int]] = [[], []]
        self.edges: list[list[tuple[int, int, int]]] = [[], []]
        self._rules_made: dict[tuple[str, int], int] = {}
        self._inside: Counter[str] = Counter()
        self.free: int | None = None

    def new(self) -> int:
        self._work.spend(3)
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
        self.jumps[start].append(self.node(self.rules[name], behind))
        self._inside[name] -= 1
        return start

    def node(self, node: Node, behind: int) -> int:
        # Here too: repetitions of nothing make no parts.
        self._work.spend(1)
        if behind == _DEAD:
            return _DEAD
        match node:
            case Text(text):
                return self.ranges([(byte, byte) for byte in _bytes(text)], behind)
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
            case FreeText():
                return self.free_text(node, behind)

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

    def free_text(self, node: FreeText, behind: int) -> int:
        words = [trigger for trigger, _ in node.parts]
        seen = states_of([*map(_bytes, words), *map(_bytes, node.excludes)], self._work)
        states = [self.new() for _ in seen]
        self.free = states[0]
        after = self.free if node.goes_on else behind
        for state, one in zip(states, seen, strict=True):
            if one.word is None:
                self.jumps[state].append(behind)
                self.edges[state] += [(*way, states[to]) for way, to in one.ways]
            elif one.word < len(words):
                self.jumps[state].append(self.node(node.parts[one.word][1], after))
        return self.free

    def ranges(self, ranges: list[Range], behind: int) -> int:
        for low, high in reversed(ranges):
            start = self.new()
            self.edges[start].append((low, high, behind))
            behind = start
        return behind


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise FormError("it has half of a surrogate pair") from None


def _deterministic(
    parts: _Parts, start: int, work: Work
) -> tuple[
    npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.intp], int | None
]:
    """Sets of parts as states, with every byte of a class in one column.

    Returns:
        ``(Q, C)`` the state behind each column, ``(Q,)`` whether it accepts,
        ``(256,)`` the column of each byte, and ``ByteAutomaton.free``.
    """
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
                jumps = parts.jumps[left.pop()]
                work.spend(len(jumps) + 1)
                for other in jumps:
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
        if len(number) > MAX_STATES:
            raise FormError(
                f"it is too large: its automaton needs more than {MAX_STATES} states"
            )
        here = waiting.popleft()
        work.spend(len(starts) // 4 + 4)
        targets: list[set[int]] = [set() for _ in starts]
        for part in here:
            for low, high, behind in parts.edges[part]:
                reached = closure(behind)
                columns = range(column_of[low], ends[high + 1])
                work.spend(len(columns) * (len(reached) // 16 + 1) // 4 + 1)
                for column in columns:
                    targets[column] |= reached
        row = np.full(len(starts), -1, dtype=np.int32)
        for column, found in enumerate(targets):
            if found:
                key = frozenset(found)
                if key not in number:
                    number[key] = len(number)
                    waiting.append(key)
                row[column] = number[key]
        rows.append(row)
    accepting = np.array([_ACCEPT in found for found in number])
    column_of_byte = np.searchsorted(starts, np.arange(256), side="right") - 1
    free = None if parts.free is None else number.get(closure(parts.free))
    return np.stack(rows), accepting, column_of_byte, free


def _minimal(
    table: npt.NDArray[np.int32],
    accepting: npt.NDArray[np.bool_],
    column_of_byte: npt.NDArray[np.intp],
    free: int | None,
    work: Work,
) -> ByteAutomaton:
    """Without states that lead nowhere, and with equal states as one."""
    # The bytes of one column of equal targets do the same everywhere.
    table, same = np.unique(table, axis=1, return_inverse=True)
    label = equal_states(table, accepting, work)
    if label[0] < 0:
        raise FormError("no text has this form")
    alive = np.flatnonzero(label >= 0)
    numbers, first = np.unique(label[alive], return_index=True)
    # In the order in which the states were found, so that the start stays first.
    order = np.argsort(first)
    rank = np.full(int(numbers[-1]) + 2, -1, dtype=np.int32)
    rank[numbers[order]] = np.arange(len(order), dtype=np.int32)
    chosen = alive[first[order]]
    targets = rank[np.append(label, -1)[table[chosen]]]
    byte_table = targets[:, same.reshape(-1)[column_of_byte]]
    return ByteAutomaton(
        np.ascontiguousarray(byte_table),
        accepting[chosen],
        None if free is None else int(rank[label[free]]),
    )
