"""The edges of an automaton, in the form in which the programme walks along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sglang_dllm.decoding.structure.automaton import TokenAutomaton

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Arcs(NamedTuple):
    """P arcs between Q states, with L labels over classes.

    A vocabulary of 126,000 tokens has hundreds of classes between two states. An arc
    stands for all edges from one state to another. Its label is the set of their
    classes. Few labels are different. Behind the arcs come the E edges one by one, for
    positions whose token is known.

    Attributes:
        begin: ``(Q + 1,)``: the first arc of each state, sorted by target; and P.
        target: ``(P + E,)``: of each arc, and of each edge.
        label: ``(P,)``: of each arc.
        label_begin: ``(L + 1,)``: where each label begins in ``label_class``.
        label_class: classes, ascending for each label.
        width: more than any class.
        edge_key: ``(E,)``: source times ``width`` plus class, ascending.
        distance: ``(Q,)``, as in the automaton.
    """

    begin: Ints
    target: Ints
    label: Ints
    label_begin: Ints
    label_class: Ints
    width: int
    edge_key: Ints
    distance: Ints


def arcs_of(automaton: TokenAutomaton) -> Arcs:
    """The arcs of one automaton."""
    source, of_class = automaton.edge_source, automaton.edge_class
    order = np.lexsort((of_class, automaton.edge_target, source))
    source, target = source[order], automaton.edge_target[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    (begins,) = is_first.nonzero()
    ends = np.append(begins[1:], len(order))
    # Equal sums of random numbers mean equal sets, but for a chance of 2^-128.
    random = np.random.default_rng(0).integers(
        0, 1 << 63, size=(automaton.num_classes + 1, 2), dtype=np.uint64
    )
    sums = np.add.reduceat(random[of_class[order]], begins, axis=0)
    _, example, label = np.unique(sums, axis=0, return_index=True, return_inverse=True)
    members = [of_class[order[begins[arc] : ends[arc]]] for arc in example]
    width = automaton.num_classes + 1
    return Arcs(
        begin=source[begins].searchsorted(np.arange(automaton.num_states + 1)),
        target=np.concatenate([target[begins], automaton.edge_target]),
        label=label.reshape(-1),
        label_begin=np.cumsum([0, *map(len, members)]),
        label_class=np.concatenate(members),
        width=width,
        edge_key=automaton.edge_source * width + of_class,
        distance=automaton.distance,
    )
