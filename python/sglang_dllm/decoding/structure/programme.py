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
from dataclasses import dataclass
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


@dataclass(eq=False)
class _Layer:
    """The ways over one position.

    Attributes:
        num_nodes: states of all strips that are reached in front of the position.
        num_going: the first ones of them, whose strips have the position.
        strip: ``(num_going,)``: of each such node.
        source, target: ``(n,)``, ascending by source: the nodes in front of and behind
            each arc that is part of a valid answer.
        arc: ``(n,)``.
        slot: ``(n,)``: where the score of each arc is.
    """

    num_nodes: int
    num_going: int
    strip: Ints
    source: Ints
    target: Ints
    arc: Ints
    slot: Ints


class Programme:
    """S strips with R masks.

    Attributes:
        rows: ``(S, W)``: the masks are numbered, strip by strip; -1 for others.
        possible: ``(R, C)``: the classes that some valid answer has at each mask, as
            the automaton of the strip counts them.
        form: ``(R,)``: the place of the automaton of each mask among ``forms``.
    """

    def __init__(self, forms: Forms, strips: Sequence[Strip]) -> None:
        """
        Args:
            forms: has the automata of all strips.
        """
        self._arcs, self.num_classes = forms.arcs, forms.arcs.width
        self._automata = list(forms.place)
        self._first = [forms.first[forms.place[one.automaton]] for one in strips]
        longest = max(len(strip.classes) for strip in strips)
        classes = np.full((len(strips), longest), -2)
        for row, strip in zip(classes, strips, strict=True):
            row[: len(strip.classes)] = strip.classes
        is_mask = classes == -1
        self.rows = np.where(is_mask, np.cumsum(is_mask).reshape(is_mask.shape) - 1, -1)
        self.num_rows = int(is_mask.sum())
        place = np.array([forms.place[strip.automaton] for strip in strips])
        self.form = np.repeat(place, is_mask.sum(axis=1))
        # The longest first, so that the nodes of those that go on are in front.
        lens = np.array([len(strip.classes) for strip in strips])
        self._order = np.argsort(-lens, kind="stable")
        self._classes = classes[self._order]
        self._row = self.rows[self._order]
        self._lens = lens[self._order]
        self._layers = self._forward(strips)
        self._drop_dead_ends()
        self._name_slots()

    def _forward(self, strips: Sequence[Strip]) -> list[_Layer]:
        """The arcs that are reached from the start and are not too far from an end."""
        arcs, num = self._arcs, self._arcs.num_states
        room = np.array([len(strip.classes) + strip.behind for strip in strips])
        room = room[self._order]
        nodes = np.array(
            [
                place * num + self._first[index] + state
                for place, index in enumerate(self._order.tolist())
                if (state := strips[index].state) is not None
                and strips[index].automaton.distance[state] <= room[place]
            ],
            dtype=np.int64,
        )
        self._begins = nodes
        is_node = np.zeros(len(strips) * num, dtype=bool)
        place_of = np.empty(len(is_node), dtype=np.int64)
        going = (self._lens[:, None] > np.arange(self._classes.shape[1])).sum(axis=0)
        has_token = (self._classes >= 0).any(axis=0)
        layers = []
        for at, num_strips in enumerate(going.tolist()):
            num_going = int(np.searchsorted(nodes, num_strips * num))
            strip, state = np.divmod(nodes[:num_going], num)
            begin, count = arcs.begin[state], arcs.count[state]
            if has_token[at]:
                of_class = self._classes[strip, at]
                (known,) = (of_class >= 0).nonzero()
                begin[known], count[known] = arcs.edges_of(
                    state[known], of_class[known]
                )
            arc = ragged(begin, count)
            source = np.repeat(np.arange(num_going), count)
            target = arcs.target[arc]
            kept = arcs.distance[target] <= (room[strip] - at - 1)[source]
            if not kept.all():
                arc, source, target = arc[kept], source[kept], target[kept]
            key = (strip * num)[source] + target
            is_node[key] = True
            (behind,) = is_node.nonzero()
            is_node[behind] = False
            place_of[behind] = np.arange(len(behind))
            layers.append(
                _Layer(len(nodes), num_going, strip, source, place_of[key], arc, arc)
            )
            nodes = behind
        self._num_last = len(nodes)
        return layers

    def _drop_dead_ends(self) -> None:
        """Keep arcs from which the tokens that are committed behind can be reached."""
        (known,) = (self._classes >= 0).any(axis=0).nonzero()
        if not len(known):
            return
        last = int(known[-1])
        lives = np.ones(self._num_nodes(last + 1), dtype=bool)
        for layer in reversed(self._layers[: last + 1]):
            kept = lives[layer.target]
            if not kept.all():
                layer.source, layer.target = layer.source[kept], layer.target[kept]
                layer.arc = layer.arc[kept]
            lives = np.ones(layer.num_nodes, dtype=bool)
            lives[: layer.num_going] = False
            lives[layer.source] = True
        if not lives.all():
            # Without a valid answer nothing of a strip is possible.
            self._drop_unreached(lives)

    def _drop_unreached(self, lives: Bools) -> None:
        """Arcs of no living node in front, from the start on."""
        self._begins = self._begins[lives]
        renumbered = np.cumsum(lives) - 1
        first = self._layers[0]
        first.source = renumbered[first.source]
        first.strip = first.strip[lives[: first.num_going]]
        first.num_going = len(first.strip)
        first.num_nodes = len(self._begins)

    def _num_nodes(self, at: int) -> int:
        """Nodes in front of a position."""
        layers = self._layers
        return layers[at].num_nodes if at < len(layers) else self._num_last

    def _name_slots(self) -> None:
        """Give the arcs of one mask and one label one slot for their score."""
        num = self._arcs.num_labels
        is_slot = np.zeros(self.num_rows * num + 1, dtype=bool)
        for at, layer in enumerate(self._layers):
            label = self._arcs.label[layer.arc]
            row = self._row[layer.strip, at][layer.source]
            layer.slot = np.where(label < 0, len(is_slot) - 1, row * num + label)
            is_slot[layer.slot] = True
        is_slot[-1] = False
        (slots,) = is_slot.nonzero()
        place = np.empty(len(is_slot), dtype=np.int64)
        place[slots] = np.arange(len(slots))
        place[-1] = len(slots)  # a token that is committed costs nothing
        for layer in self._layers:
            layer.slot = place[layer.slot]
        self._slot_row, label = np.divmod(slots, num)
        self._slot_count = self._arcs.label_count[label]
        self._slot_begin = np.cumsum(self._slot_count) - self._slot_count
        of_class = self._arcs.label_class[
            ragged(self._arcs.label_begin[label], self._slot_count)
        ]
        self._entry_class = of_class
        entry_row = np.repeat(self._slot_row, self._slot_count)
        self._entry = entry_row * self.num_classes + of_class

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

    @cached_property
    def possible(self) -> Bools:
        found = np.zeros(self.num_rows * self.num_classes, dtype=bool)
        found[self._entry] = True
        return found.reshape(self.num_rows, self.num_classes)

    def best_classes(self, scores: Floats) -> Ints:
        """``(R,)``: the classes of the valid answer of each strip with the best sum.

        Of equal sums, the first arcs win. -1 where a strip has no valid answer.

        Args:
            scores: ``(R, C)``, finite where a class is possible.
        """
        score = np.zeros(len(self._slot_begin) + 1)
        entries = scores.reshape(-1)[self._entry]
        if len(entries):
            score[:-1] = np.maximum.reduceat(entries, self._slot_begin)
        best_arcs = self._best_arcs(score)
        node = np.arange(len(self._begins))
        slot_of = np.full(self.num_rows, -1)
        for at, (layer, best) in enumerate(zip(self._layers, best_arcs, strict=True)):
            node = node[: np.searchsorted(node, layer.num_going)]
            arc = best[node]
            row = self._row[layer.strip[node], at]
            slot_of[row[row >= 0]] = layer.slot[arc][row >= 0]
            node = layer.target[arc]
        found = np.full(self.num_rows, -1)
        (chosen,) = (slot_of >= 0).nonzero()
        slot = slot_of[chosen]
        counts = self._slot_count[slot]
        entry = ragged(self._slot_begin[slot], counts)
        is_best = entries[entry] == np.repeat(score[slot], counts)
        row = np.repeat(chosen, counts)[is_best]
        # The last one that is written stays, which is the first class.
        found[row[::-1]] = self._entry_class[entry[is_best]][::-1]
        return found

    def _best_arcs(self, score: Floats) -> list[Ints]:
        """For each layer the best arc of each node, as its place in the layer."""
        found: list[Ints] = []
        value = np.zeros(self._num_last)
        for layer in reversed(self._layers):
            sums = value[layer.target] + score[layer.slot]
            value = np.zeros(layer.num_nodes)
            value[: layer.num_going] = -np.inf
            best = np.zeros(layer.num_going, dtype=np.int64)
            if len(sums):
                (begins,) = np.diff(layer.source, prepend=-1).nonzero()
                value[layer.source[begins]] = np.maximum.reduceat(sums, begins)
                (is_best,) = (sums == value[layer.source]).nonzero()
                # The last one that is written stays, which is the first arc.
                best[layer.source[is_best][::-1]] = is_best[::-1]
            found.append(best)
        return found[::-1]
