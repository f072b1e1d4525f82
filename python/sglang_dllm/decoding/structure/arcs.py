"""The edges of automata, in the form in which the programme walks along them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sglang_dllm.decoding.structure.automaton import TokenAutomaton

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Arcs:
    """P arcs between Q states, with L labels over classes, of one or more automata.

    A vocabulary of 126,000 tokens has hundreds of classes between two states. An arc
    stands for all edges from one state to another. Its label is the set of their
    classes. Few labels are different. Behind the arcs of an automaton come its E edges
    one by one, for positions whose token is known.

    Attributes:
        begin, count: ``(Q,)``: the arcs of each source.
        target, label: ``(P + E,)``: of each arc; the label of an edge is -1.
        label_begin, label_count: ``(L,)``: where a label is in ``label_class``.
        label_class: classes as their automaton counts them, ascending for each label.
        width: more than any class.
        edge_key, edge_arc: ``(E,)``: source times ``width`` plus class, ascending; and
            the place among the arcs.
        distance: ``(Q,)``, as in the automata.
    """

    begin: Ints
    count: Ints
    target: Ints
    label: Ints
    label_begin: Ints
    label_count: Ints
    label_class: Ints
    width: int
    edge_key: Ints
    edge_arc: Ints
    distance: Ints

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.begin)

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.label_begin)

    def edges_of(self, states: Ints, classes: Ints) -> tuple[Ints, Ints]:
        """The edge of each of n states for a class: its arc, and 1 or 0 for none."""
        key = states * self.width + classes
        at = np.minimum(self.edge_key.searchsorted(key), len(self.edge_key) - 1)
        return self.edge_arc[at], (self.edge_key[at] == key).astype(np.int64)


def arcs_of(automaton: TokenAutomaton) -> Arcs:
    """The arcs of one automaton, sorted by source, then by target."""
    source, of_class = automaton.edge_source, automaton.edge_class
    order = np.lexsort((of_class, automaton.edge_target, source))
    source, target = source[order], automaton.edge_target[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    (begins,) = is_first.nonzero()
    sizes = np.diff(np.append(begins, len(order)))
    # Equal sums of random numbers mean equal sets, but for a chance of 2^-128.
    random = np.random.default_rng(0).integers(
        0, 1 << 63, size=(automaton.num_classes + 1, 2), dtype=np.uint64
    )
    sums = np.add.reduceat(random[of_class[order]], begins, axis=0)
    _, example, label = np.unique(sums, axis=0, return_index=True, return_inverse=True)
    label_count = sizes[example]
    count = np.bincount(source[begins], minlength=automaton.num_states)
    width, num_edges = automaton.num_classes + 1, len(order)
    return Arcs(
        begin=np.cumsum(count) - count,
        count=count,
        target=np.concatenate([target[begins], automaton.edge_target]),
        label=np.concatenate([label.reshape(-1), np.full(num_edges, -1)]),
        label_begin=np.cumsum(label_count) - label_count,
        label_count=label_count,
        label_class=of_class[order][ragged(begins[example], label_count)],
        width=width,
        edge_key=automaton.edge_source * width + of_class,
        edge_arc=len(begins) + np.arange(num_edges),
        distance=automaton.distance,
    )


@dataclass(frozen=True)
class Forms:
    """Some automata side by side.

    Attributes:
        place: of each automaton.
        first: the first state of each one among the states of ``arcs``.
    """

    place: dict[TokenAutomaton, int]
    arcs: Arcs
    first: list[int]

    @classmethod
    def of(cls, automata: Iterable[TokenAutomaton]) -> Forms:
        """The automata, each once."""
        place = {one: i for i, one in enumerate(dict.fromkeys(automata))}
        parts = [automaton.arcs for automaton in place]
        if len(parts) == 1:
            return cls(place, parts[0], [0])
        first = starts_of([part.num_states for part in parts])
        return cls(place, _joined(parts, first), first[:-1])


def _joined(parts: Sequence[Arcs], first: Sequence[int]) -> Arcs:
    arcs = starts_of([len(part.target) for part in parts])
    labels = starts_of([part.num_labels for part in parts])
    classes = starts_of([len(part.label_class) for part in parts])
    width = max(part.width for part in parts)

    def joined(name: str, by: Sequence[int] = ()) -> Ints:
        values = [getattr(part, name) for part in parts]
        if by:
            values = [value + at for value, at in zip(values, by, strict=False)]
        return np.concatenate(values)

    def key(part: Arcs, at: int) -> Ints:
        source, of_class = np.divmod(part.edge_key, part.width)
        return (source + at) * width + of_class

    label = [
        np.where(part.label < 0, -1, part.label + at)
        for part, at in zip(parts, labels, strict=False)
    ]
    return Arcs(
        begin=joined("begin", arcs),
        count=joined("count"),
        target=joined("target", first),
        label=np.concatenate(label),
        label_begin=joined("label_begin", classes),
        label_count=joined("label_count"),
        label_class=joined("label_class"),
        width=width,
        edge_key=np.concatenate(list(map(key, parts, first))),
        edge_arc=joined("edge_arc", arcs),
        distance=joined("distance"),
    )


def starts_of(sizes: Sequence[int]) -> list[int]:
    """The begins of some ranges, and the end of the last one."""
    return [0, *np.cumsum(sizes).tolist()]


def ragged(begins: Ints, counts: Ints) -> Ints:
    """The integers of some ranges, one range behind the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(begins - ends + counts, counts)
