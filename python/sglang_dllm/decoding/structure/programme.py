"""The most probable valid answers of many canvases, by one dynamic programme.

DINGO (arXiv 2505.23061) decodes a block of a left-to-right answer so. Here masks may
stand anywhere. The programme of a canvas is over a strip of it: from the first mask to
the last position that the step may commit. The state in front of the strip is known.
Behind its end, every state is possible from which the rest of the canvas is long enough
to end the answer; the rest decides nothing else, unless a token is committed there.

All of it runs on the host. Numpy takes a microsecond for an operation over few numbers,
a launch on a GPU takes five, and a strip has some thirty operations a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sglang_dllm.decoding.structure.arcs import Bools, Forms, Ints, ragged
from sglang_dllm.decoding.structure.automaton import TokenAutomaton

Floats = npt.NDArray[np.float64]


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


@dataclass(frozen=True, eq=False)
class _Ways:
    """All ways of all strips: nodes, which are states in front of positions, and arcs.

    Nodes and arcs are in the order of their positions. Behind the last arc is one from
    the last node to itself, for strips that have ended.

    Attributes:
        first_nodes: the node in front of each strip.
        num_nodes: with the last one, which no arc of a strip reaches.
        source, target: of each arc. Arcs of one source are neighbours.
        slot: where the score of each arc is; -1 for a token that is committed.
        ends: ``(W + 1,)``: where the arcs of each position begin, and the last end.
        going: first and last node of each position whose strip goes on.
    """

    first_nodes: Ints
    num_nodes: int
    source: Ints
    target: Ints
    slot: Ints
    ends: Ints
    going: list[slice]


class Programme:
    """S strips with R masks.

    Attributes:
        rows: ``(S, W)``: the masks are numbered, strip by strip; -1 for others.
        form: ``(R,)``: the place of the automaton of each mask among ``forms``.
    """

    def __init__(self, forms: Forms, strips: Sequence[Strip]) -> None:
        """
        Args:
            forms: has the automata of all strips.
        """
        self._arcs, self.num_classes = forms.arcs, forms.arcs.width
        self._automata = list(forms.place)
        lens = np.array([len(strip.classes) for strip in strips])
        classes = np.full((len(strips), int(lens.max())), -2)
        for row, strip in zip(classes, strips, strict=True):
            row[: len(strip.classes)] = strip.classes
        is_mask = classes == -1
        self.rows = np.where(is_mask, np.cumsum(is_mask).reshape(is_mask.shape) - 1, -1)
        self.num_rows = int(is_mask.sum())
        place = np.array([forms.place[strip.automaton] for strip in strips])
        self.form = np.repeat(place, is_mask.sum(axis=1))
        # The longest first, so that the nodes of those that go on are in front.
        order = np.argsort(-lens, kind="stable")
        first = np.array(forms.first)[place]
        ways = self._forward([strips[i] for i in order], first[order], order)
        known = np.flatnonzero((classes >= 0).any(axis=0))
        if len(known):
            ways = _without_dead_ends(ways, int(known[-1]) + 1)
        self._name_slots(ways)

    def _forward(self, strips: Sequence[Strip], first: Ints, order: Ints) -> _Ways:
        """The arcs that are reached from the start and are not too far from an end.

        Args:
            strips: the longest first.
            first: the first state of each one's automaton.
            order: the places of these strips in ``rows``.
        """
        arcs, num = self._arcs, self._arcs.num_states
        lens = np.array([len(strip.classes) for strip in strips])
        room = lens + np.array([strip.behind for strip in strips])
        width = self.rows.shape[1]
        slot_base = self.rows[order].T * arcs.num_labels
        classes = np.full((width, len(strips)), -1)
        for at, strip in enumerate(strips):
            classes[: len(strip.classes), at] = strip.classes
        has_token = np.any(classes >= 0, axis=1).tolist()
        going = (lens[None] > np.arange(width)[:, None]).sum(axis=1)
        tightest = np.minimum.accumulate(room)[going - 1] - np.arange(width) - 1
        is_node = np.zeros(len(strips) * num, dtype=bool)
        place_of = np.zeros(len(is_node), dtype=np.int64)
        begins = [
            at * num + first[at] + strip.state
            for at, strip in enumerate(strips)
            if strip.state is not None
            and strip.automaton.distance[strip.state] <= room[at]
        ]
        nodes = np.array(begins, dtype=np.int64)
        is_tight = np.atleast_1d(arcs.distance.max() > tightest).tolist()
        num_before, ends = 0, [0]
        sources, targets, slots, going_nodes = [], [], [], []
        for at, num_strips in enumerate(going.tolist()):
            here = nodes[: nodes.searchsorted(num_strips * num)]
            owner = here // num
            state = here - owner * num
            begin, count = arcs.begin[state], arcs.count[state]
            if has_token[at]:
                of_class = classes[at, owner]
                (known,) = (of_class >= 0).nonzero()
                edges = arcs.edges_of(state[known], of_class[known])
                begin[known], count[known] = edges
            source = np.arange(len(here)).repeat(count)
            arc = (begin - count.cumsum() + count)[source]
            arc += np.arange(len(source))
            target = arcs.target[arc]
            if is_tight[at]:
                left = room[owner] - (at + 1)
                kept = arcs.distance[target] <= left[source]
                source, arc, target = source[kept], arc[kept], target[kept]
            key = (here - state)[source] + target
            is_node[key] = True
            (behind,) = is_node.nonzero()
            is_node[behind] = False
            num_behind = num_before + len(nodes)
            place_of[behind] = np.arange(num_behind, num_behind + len(behind))
            label = arcs.label[arc]
            slot = slot_base[at, owner][source] + label
            if has_token[at]:
                slot[label < 0] = -1
            ends.append(ends[-1] + len(source))
            going_nodes.append(slice(num_before, num_before + len(here)))
            sources.append(source + num_before)
            targets.append(place_of[key])
            slots.append(slot)
            nodes, num_before = behind, num_behind
        last = num_before + len(nodes)
        return _Ways(
            np.arange(len(begins)),
            last + 1,
            np.concatenate([*sources, [last]]),
            np.concatenate([*targets, [last]]),
            np.concatenate([*slots, [-1]]),
            np.array(ends),
            going_nodes,
        )

    def _name_slots(self, ways: _Ways) -> None:
        """Give the arcs of one mask and one label one slot for their score."""
        num = self._arcs.num_labels
        is_slot = np.zeros(self.num_rows * num + 1, dtype=bool)
        is_slot[ways.slot] = True
        is_slot[-1] = False
        (slots,) = is_slot.nonzero()
        place = np.empty(len(is_slot), dtype=np.int64)
        place[slots] = np.arange(len(slots))
        place[-1] = -1
        self._ways = replace(ways, slot=place[ways.slot])
        self._slot_row, label = np.divmod(slots, num)
        self._slot_count = self._arcs.label_count[label]
        self._slot_begin = np.cumsum(self._slot_count) - self._slot_count
        entry = ragged(self._arcs.label_begin[label], self._slot_count)
        self._entry_class = self._arcs.label_class[entry]
        entry_row = np.repeat(self._slot_row, self._slot_count)
        self._entry = entry_row * self.num_classes + self._entry_class

    @cached_property
    def possible(self) -> Bools:
        """``(R, C)``: the classes that some valid answer has at each mask.

        They are those of the automaton of its strip.
        """
        found = np.zeros(self.num_rows * self.num_classes, dtype=bool)
        found[self._entry] = True
        return found.reshape(self.num_rows, self.num_classes)

    @cached_property
    def certain(self) -> Bools:
        """``(R,)``: one token alone is possible, or nothing but an EOS."""
        found: Bools = self.possible.sum(axis=1) == 1
        (rows,) = found.nonzero()
        classes = self.possible[rows].argmax(axis=1)
        for place, automaton in enumerate(self._automata):
            some = self.form[rows] == place
            one = classes[some]
            is_one = automaton.class_size[one] == 1
            found[rows[some]] = is_one | (one == automaton.eos_class)
        return found

    def best_classes(self, scores: Floats) -> Ints:
        """``(R,)``: the classes of the valid answer of each strip with the best sum.

        The first arcs win among equal sums. -1 where a strip has no valid answer.

        Args:
            scores: ``(R, C)``, finite where a class is possible.
        """
        score = np.zeros(len(self._slot_begin) + 1)  # the last one is of slot -1
        entries = scores.reshape(-1)[self._entry]
        if len(entries):
            np.maximum.reduceat(entries, self._slot_begin, out=score[:-1])
        slots = self._best_slots(score)
        counts = self._slot_count[slots]
        entry = ragged(self._slot_begin[slots], counts)
        is_best = entries[entry] == np.repeat(score[slots], counts)
        row = np.repeat(self._slot_row[slots], counts)[is_best]
        found = np.full(self.num_rows, -1)
        # The last one that is written stays, which is the first class.
        found[row[::-1]] = self._entry_class[entry[is_best]][::-1]
        return found

    def _best_slots(self, score: Floats) -> Ints:
        """The slots on the best way of each strip: one for each mask."""
        ways = self._ways
        source, target = ways.source, ways.target
        sums = score[ways.slot]
        (begins,) = np.diff(source, prepend=-1).nonzero()
        with_arcs = source[begins]
        of_layer = begins.searchsorted(ways.ends).tolist()
        ends = ways.ends.tolist()
        value = np.zeros(ways.num_nodes)
        for at in range(len(ends) - 2, -1, -1):
            begin, end = ends[at], ends[at + 1]
            if begin < end:
                sums[begin:end] += value[target[begin:end]]
                some = slice(of_layer[at], of_layer[at + 1])
                best = np.maximum.reduceat(sums[:end], begins[some])
                value[with_arcs[some]] = best
        (is_best,) = (sums == value[source]).nonzero()
        best_arc = np.full(ways.num_nodes, len(source) - 1)
        # The last one that is written stays, which is the first arc.
        best_arc[source[is_best][::-1]] = is_best[::-1]
        node, way = ways.first_nodes, []
        for _ in ways.going:
            arc = best_arc[node]
            way.append(arc)
            node = target[arc]
        slots = ways.slot[np.concatenate(way)]
        return slots[slots >= 0]


def _without_dead_ends(ways: _Ways, last: int) -> _Ways:
    """Without arcs from which a token that is committed behind cannot be reached.

    Args:
        last: no token is committed from this position on.
    """
    source, target = ways.source, ways.target
    lives = np.ones(ways.num_nodes, dtype=bool)
    for nodes in ways.going[:last]:
        lives[nodes] = False
    ends = ways.ends.tolist()
    for at in range(last - 1, -1, -1):
        arcs = slice(ends[at], ends[at + 1])
        lives[source[arcs][lives[target[arcs]]]] = True
    kept = lives[source] & lives[target]
    num_kept = np.concatenate([[0], np.cumsum(kept)])
    return replace(
        ways,
        source=source[kept],
        target=target[kept],
        slot=ways.slot[kept],
        ends=num_kept[ways.ends],
    )
