"""An automaton over the tokens of a vocabulary from one over bytes.

A token does to the states what its bytes do, one after the other. Tokens with equal
beginnings share the work, and tokens that do the same share the result: a string of at
most 400 characters asks how many characters a token has, for all states at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from sglang_dllm.decoding.structure.automaton import NEVER, Ints, TokenAutomaton
from sglang_dllm.grammar.byte_automaton import ByteAutomaton
from sglang_dllm.grammar.errors import FormError

MAX_EDGES = 2_000_000
"""Edges of an automaton over tokens."""

MAX_MOVES = 4_000_000
"""States that beginnings of tokens move, summed over beginnings that do not do the
same: the work and the memory of a compilation."""

_FEWEST_MOVES = 32
"""Counted for each beginning: it takes some time, however few states it moves."""


class Vocabulary:
    """The bytes of all tokens, in an order in which equal beginnings are neighbours.

    Attributes:
        size: V.
        eos_ids: tokens that end an answer.
        tokens: ``(T,)``: the tokens that are text, sorted by their bytes.
        texts: the bytes of each of them.
        silent: tokens that are no text, such as special ones, and what a client reads
            that has them shown.
        never: tokens that no answer has, though a model may give them a share.
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        eos_ids: Sequence[int],
        size: int,
        silent: Mapping[int, bytes] | None = None,
        never: Iterable[int] = (),
    ) -> None:
        """
        Args:
            tokens: the bytes that each token adds to a text; None or empty for tokens
                that cannot be text.
            size: V; tokens behind the last one cannot be text.
        """
        self.size, self.eos_ids = size, tuple(eos_ids)
        self.silent, self.never = dict(silent or {}), tuple(never)
        texts = [
            (data, token)
            for token, data in enumerate(tokens)
            if data and token not in self.eos_ids
        ]
        texts.sort()
        self.tokens = np.array([token for _, token in texts], dtype=np.int64)
        self.texts = [data for data, _ in texts]
        self._lens = np.array([len(data) for data in self.texts], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(self.texts), dtype=np.uint8)
        self._starts = np.cumsum(self._lens) - self._lens
        self.longest = int(self._lens.max(initial=0))

    def moves(self, automaton: ByteAutomaton, sources: Ints) -> tuple[Ints, Moves]:
        """The effect of the tokens on some states.

        Returns:
            ``(T,)``: the number of what each token does, -1 for a token that none of
            the states takes; and what that is.

        Raises:
            FormError: there is too much of it.
        """
        columns, same = np.unique(automaton.next_state, axis=1, return_inverse=True)
        column_of_byte = same.reshape(-1)
        moves = Moves(columns, sources)
        does = np.full(len(self.tokens), -1, dtype=np.int64)
        some = np.arange(len(self.tokens))
        at = np.zeros(len(some), dtype=np.int64)
        for place in range(self.longest):
            byte = self._bytes[self._starts[some] + place]
            at = moves.behind(at, column_of_byte[byte])
            some, at = some[at >= 0], at[at >= 0]
            is_end = self._lens[some] == place + 1
            does[some[is_end]] = at[is_end]
            some, at = some[~is_end], at[~is_end]
        return does, moves

    def forced_moves(
        self, automaton: ByteAutomaton, forced: Mapping[int, bytes]
    ) -> dict[int, list[tuple[int, int]]]:
        """The tokens of states from which all answers go on with one text.

        Text that has one spelling in bytes has many in tokens. Only the longest token
        stays, so that nothing is left to decide and the token is committed at once.
        Tokens that reach over the end of the text stay too, where one token takes all
        of it.

        Args:
            forced: the text of each state, of two bytes and more.

        Returns:
            By the token's place in ``tokens``: states and where it leads from them.

        Raises:
            FormError: there are too many.
        """
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        num = 0
        for state, text in forced.items():
            for place in self._long_tokens(text):
                at, target = 0, state
                data = self.texts[place]
                while at < len(data) and target >= 0:
                    target = int(automaton.next_state[target, data[at]])
                    at += 1
                num += _FEWEST_MOVES
                if num > MAX_MOVES:
                    raise _too_many(MAX_MOVES, "moves")
                if target >= 0:
                    found[place].append((state, target))
        return found

    def _long_tokens(self, text: bytes) -> Iterable[int]:
        for num in range(min(len(text), self.longest), 0, -1):
            place = bisect_left(self.texts, text[:num])
            if place < len(self.texts) and self.texts[place] == text[:num]:
                if num < len(text):
                    return (place,)
                break
        first = bisect_left(self.texts, text)
        last = first
        while last < len(self.texts) and self.texts[last].startswith(text):
            last += 1
        return range(first, last)


class Moves:
    """Functions from states to states, each of which bytes make of another."""

    def __init__(self, columns: npt.NDArray[np.int32], sources: Ints) -> None:
        """
        Args:
            columns: ``(Q, C)``: the state behind each column of bytes, -1 for none.
            sources: the states that are of interest.
        """
        self._columns = columns
        self._numbers: dict[bytes, int] = {}
        self._left = MAX_MOVES
        self.pairs: list[tuple[Ints, Ints]] = []
        """Sources, and where each of them leads."""
        self._number(sources, sources)

    def behind(self, moves: Ints, columns: npt.NDArray[np.intp]) -> Ints:
        """The numbers of functions that go on with one more byte, -1 for none."""
        num_columns = self._columns.shape[1]
        asked, same = np.unique(moves * num_columns + columns, return_inverse=True)
        found = np.empty(len(asked), dtype=np.int64)
        for index, one in enumerate(asked.tolist()):
            sources, at = self.pairs[one // num_columns]
            self._left -= len(at) + _FEWEST_MOVES
            if self._left < 0:
                raise _too_many(MAX_MOVES, "moves")
            targets = self._columns[at, one % num_columns]
            is_alive = targets >= 0
            found[index] = self._number(sources[is_alive], targets[is_alive])
        return found[same.reshape(-1)]

    def _number(self, sources: Ints, targets: Ints) -> int:
        if not len(sources):
            return -1
        data = blake2b(sources.tobytes(), digest_size=16)
        data.update(targets.tobytes())
        number = self._numbers.setdefault(data.digest(), len(self.pairs))
        if number == len(self.pairs):
            self.pairs.append((sources, targets))
        return number


def token_automaton(automaton: ByteAutomaton, vocabulary: Vocabulary) -> TokenAutomaton:
    """The automaton over tokens, with an end state behind the accepting ones.

    Raises:
        FormError: it is too large, or no tokens make a valid answer.
    """
    end = len(automaton.accepting)
    texts = _forced(automaton, vocabulary.longest + 1)
    long_texts = {state: text for state, text in enumerate(texts) if len(text) > 1}
    # One byte has one spelling; a token of it that reaches further stays.
    sources = [state for state in range(end) if state not in long_texts]
    does, moves = vocabulary.moves(automaton, np.array(sources, dtype=np.int32))
    forced = vocabulary.forced_moves(automaton, long_texts)
    token_class, members = _classes(does, forced, vocabulary)
    edges = [_edges(members, moves, does, forced)]
    of_eos = len(members)
    if automaton.free is not None:
        more = _silent_classes(automaton, automaton.free, vocabulary, token_class)
        edges += more
        of_eos += len(more)
    token_class[list(vocabulary.eos_ids)] = of_eos
    token_class[token_class < 0] = of_eos + 1
    ends = [*np.flatnonzero(automaton.accepting).tolist(), end]
    edges.append(_edges_to(end, ends, np.array([of_eos])))
    source, of_class, target = np.concatenate(edges, axis=1)
    order = np.lexsort((of_class, source))
    source, of_class, target = source[order], of_class[order], target[order]
    accepting = np.append(automaton.accepting, True)
    distance = _distance(source, target, accepting)
    if distance[0] >= NEVER:
        raise FormError("no tokens of this model make a valid answer")
    alive = distance[target] < NEVER
    source, of_class, target = source[alive], of_class[alive], target[alive]
    return TokenAutomaton(
        start=0,
        end=end,
        token_class=token_class,
        num_classes=of_eos + 1,
        edge_source=source,
        edge_class=of_class,
        edge_target=target,
        accepting=accepting,
        distance=distance,
        forced=(*texts, b""),
        has_free_text=automaton.free is not None,
    )


def _too_many(most: int, what: str) -> FormError:
    return FormError(f"it is too large: it needs more than {most} {what}")


def _classes(
    does: Ints, forced: Mapping[int, list[tuple[int, int]]], vocabulary: Vocabulary
) -> tuple[Ints, list[int]]:
    """Number tokens so that those which do the same from every state are equal.

    Returns:
        ``(V,)``, -1 for a token that no state takes; and the place of one token of
        each class.
    """
    # Tokens of forced states get numbers behind all others.
    special: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
    first_special = int(does.max(initial=-1)) + 1
    key = does.copy()
    for place, pairs in forced.items():
        which = (int(does[place]), tuple(pairs))
        key[place] = first_special + special.setdefault(which, len(special))
    (taken,) = np.nonzero(key >= 0)
    _, first, number = np.unique(key[taken], return_index=True, return_inverse=True)
    token_class = np.full(vocabulary.size, -1, dtype=np.int64)
    token_class[vocabulary.tokens[taken]] = number.reshape(-1)
    return token_class, taken[first].tolist()


def _edges(
    members: list[int],
    moves: Moves,
    does: Ints,
    forced: Mapping[int, list[tuple[int, int]]],
) -> Ints:
    """``(3, E)``: source, class and target of the edges of tokens that are text."""
    parts: list[npt.NDArray[np.int64]] = [np.empty((3, 0), dtype=np.int64)]
    num_edges = 0
    for number, place in enumerate(members):
        pairs = []
        if does[place] >= 0:
            pairs.append(np.stack(moves.pairs[does[place]]).astype(np.int64))
        if place in forced:
            pairs.append(np.array(forced[place], dtype=np.int64).T)
        found = np.concatenate(pairs, axis=1)
        num_edges += found.shape[1]
        if num_edges > MAX_EDGES:
            raise _too_many(MAX_EDGES, "edges")
        numbers = np.full((1, found.shape[1]), number)
        parts.append(np.concatenate([found[:1], numbers, found[1:]]))
    return np.concatenate(parts, axis=1)


def _edges_to(target: int, sources: Sequence[int], classes: Ints) -> Ints:
    """``(3, E)``: the edges of some classes from some states to one."""
    source = np.repeat(np.array(sources, dtype=np.int64), len(classes))
    of_class = np.tile(classes, len(sources))
    return np.stack([source, of_class, np.full(len(source), target)])


def _silent_classes(
    automaton: ByteAutomaton, free: int, vocabulary: Vocabulary, token_class: Ints
) -> list[Ints]:
    """Give classes of their own to tokens that no state takes, in place.

    A silent token may come in free text. It may be shown or not, and neither may make
    a trigger of the text around it. Tokens that no answer has are not forbidden in free
    text, so that the probabilities of the others are those without a form. Another
    token comes in their place, so that they lead where one does: none may bring back
    text behind an end.

    Returns:
        The edges ``(3, E)`` of each class.
    """
    is_left = token_class < 0
    is_left[list(vocabulary.eos_ids)] = False
    is_silent, is_never = np.zeros_like(is_left), np.zeros_like(is_left)
    for token, shown in vocabulary.silent.items():
        state = free
        for byte in shown:
            state = int(automaton.next_state[state, byte]) if state >= 0 else state
        is_silent[token] = state == free
    is_never[list(vocabulary.never)] = True
    number, edges = int(token_class.max(initial=-1)) + 1, []
    ends = np.flatnonzero(automaton.accepting)
    goes_on = (automaton.next_state[ends] == free).any(axis=1)
    for members, sources, targets in (
        (is_left & is_silent, np.array([free]), np.array([free])),
        (is_left & is_never, ends, np.where(goes_on, free, ends)),
    ):
        if members.any():
            token_class[members] = number
            edges.append(np.stack([sources, np.full_like(sources, number), targets]))
            number += 1
    return edges


def _distance(source: Ints, target: Ints, accepting: npt.NDArray[np.bool_]) -> Ints:
    """``(Q,)``: the fewest tokens to an accepting state."""
    pairs = np.unique(np.stack([target, source]), axis=1)
    starts = np.searchsorted(pairs[0], np.arange(len(accepting) + 1))
    distance = np.where(accepting, 0, NEVER).astype(np.int64)
    front, steps = np.flatnonzero(accepting), 0
    while len(front):
        steps += 1
        edges = [pairs[1, starts[one] : starts[one + 1]] for one in front.tolist()]
        before = np.unique(np.concatenate(edges))
        front = before[distance[before] == NEVER]
        distance[front] = steps
    return distance


def _forced(automaton: ByteAutomaton, most: int) -> list[bytes]:
    """The bytes with which all continuations of each state begin, ``most`` of them.

    No token is longer, so that more would be of no use.
    """
    is_open = automaton.next_state >= 0
    is_forced = (is_open.sum(axis=1) == 1) & ~automaton.accepting
    byte = is_open.argmax(axis=1).tolist()
    behind = automaton.next_state.max(axis=1).tolist()
    found: list[bytes | None] = [
        None if is_one else b"" for is_one in is_forced.tolist()
    ]
    for state in range(len(byte)):
        chain = []
        # It ends: an accepting state can be reached, and no forced one accepts.
        while found[state] is None:
            chain.append(state)
            state = behind[state]
        for one in reversed(chain):
            rest = found[behind[one]] or b""
            found[one] = bytes([byte[one]]) + rest[: most - 1]
    return [text or b"" for text in found]
