"""An automaton over the tokens of a vocabulary from one over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sglang_dllm.decoding.structure.automaton import NEVER, Ints, TokenAutomaton
from sglang_dllm.grammar.byte_automaton import ByteAutomaton
from sglang_dllm.grammar.errors import FormError

Step: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Tokens, and the state behind each of them."""

MAX_EDGES = 2_000_000
"""Edges of an automaton over tokens."""


class Vocabulary:
    """The bytes of all tokens, in an order in which equal beginnings are neighbours.

    Attributes:
        size: V.
        eos_ids: tokens that end an answer.
        num_bytes: ``(V,)``: of each token; 0 of one that is no text.
    """

    def __init__(
        self, tokens: Sequence[bytes | None], eos_ids: Sequence[int], size: int
    ) -> None:
        """
        Args:
            tokens: the bytes that each token adds to a text; None or empty for tokens
                that cannot be text.
            size: V; tokens behind the last one cannot be text.
        """
        self.size, self.eos_ids = size, tuple(eos_ids)
        texts = [
            (data, token)
            for token, data in enumerate(tokens)
            if data and token not in self.eos_ids
        ]
        texts.sort()
        self._tokens = np.array([token for _, token in texts], dtype=np.int32)
        self._lens = np.array([len(data) for data, _ in texts], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(d for d, _ in texts), dtype=np.uint8)
        self._starts = np.cumsum(self._lens) - self._lens
        self.num_bytes = np.zeros(size, dtype=np.int64)
        self.num_bytes[self._tokens] = self._lens
        first = self._bytes[self._starts] if len(texts) else np.empty(0, np.uint8)
        self._first_at = np.searchsorted(first, np.arange(257))

    def step(self, automaton: ByteAutomaton, state: int) -> Step:
        """The tokens that a state takes, and the states that they lead to."""
        row = automaton.next_state[state]
        found = [
            np.arange(*self._first_at[byte : byte + 2])
            for byte in np.flatnonzero(row >= 0)
        ]
        some = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        at = row[self._bytes[self._starts[some]]]
        taken, targets = [], []
        place = 1
        while len(some):
            is_end = self._lens[some] == place
            taken.append(some[is_end])
            targets.append(at[is_end])
            some, at = some[~is_end], at[~is_end]
            at = automaton.next_state[at, self._bytes[self._starts[some] + place]]
            some, at = some[at >= 0], at[at >= 0]
            place += 1
        if not taken:
            nothing = np.empty(0, dtype=np.int32)
            return nothing, nothing
        return self._tokens[np.concatenate(taken)], np.concatenate(targets)


def token_automaton(automaton: ByteAutomaton, vocabulary: Vocabulary) -> TokenAutomaton:
    """The automaton over tokens, with an end state behind the accepting ones.

    Raises:
        FormError: it has too many edges, or no tokens make a valid answer.
    """
    num_bytes_states = len(automaton.accepting)
    end = num_bytes_states
    forced = _forced(automaton)
    steps = [
        _in_long_tokens(vocabulary.step(automaton, state), text, vocabulary)
        for state, text in enumerate(forced)
    ]
    token_class, num_classes = _classes(steps, vocabulary.size)
    of_eos = num_classes
    token_class[list(vocabulary.eos_ids)] = of_eos
    token_class[token_class < 0] = num_classes + 1
    edges: list[npt.NDArray[np.int64]] = []
    num_edges = 0
    for state, (tokens, targets) in enumerate(steps):
        of_class = np.full(num_classes, -1, dtype=np.int64)
        of_class[token_class[tokens]] = targets
        (classes,) = np.nonzero(of_class >= 0)
        sources = np.full(len(classes), state)
        edges.append(np.stack([sources, classes, of_class[classes]]))
        num_edges += len(classes)
        if num_edges > MAX_EDGES:
            raise FormError(f"it is too large: it needs more than {MAX_EDGES} edges")
        if automaton.accepting[state]:
            edges.append(np.array([[state], [of_eos], [end]]))
    edges.append(np.array([[end], [of_eos], [end]]))
    source, of_class, target = np.concatenate(edges, axis=1)
    accepting = np.append(automaton.accepting, True)
    distance = _distance(source, target, accepting)
    if distance[0] >= NEVER:
        raise FormError("no tokens of this model make a valid answer")
    return TokenAutomaton(
        start=0,
        end=end,
        token_class=token_class,
        num_classes=num_classes + 1,
        edge_source=source,
        edge_class=of_class,
        edge_target=target,
        accepting=accepting,
        distance=distance,
        forced=(*forced, b""),
    )


def _in_long_tokens(step: Step, text: bytes, vocabulary: Vocabulary) -> Step:
    """The step of a state from which all answers go on with ``text``.

    Text that has one spelling in bytes has many in tokens. Only the longest token
    stays, so that nothing is left to decide and the token is committed at once. A token
    that reaches over the end of the text stays too, where one token takes all of it.
    """
    tokens, targets = step
    if not len(tokens):
        return step
    lens = vocabulary.num_bytes[tokens]
    longest = lens[lens <= len(text)].max(initial=0)
    if longest == len(text):
        kept = lens >= len(text)
    else:
        kept = lens == longest
        kept[np.flatnonzero(kept)[1:]] = False
    return tokens[kept], targets[kept]


def _classes(steps: Sequence[Step], vocab_size: int) -> tuple[Ints, int]:
    """Number tokens so that those which do the same from every state are equal.

    Returns:
        ``(V,)``, -1 for a token that no state takes; and the number of classes.
    """
    rng = np.random.default_rng(0)
    mixed = np.zeros((vocab_size, 2), dtype=np.uint64)
    is_taken = np.zeros(vocab_size, dtype=bool)
    for tokens, targets in steps:
        weights = rng.integers(0, 1 << 63, size=2, dtype=np.uint64) * 2 + 1
        # A product with an odd weight, then bits from above: sums of such numbers
        # are equal for equal columns only, but for a chance of 2^-128.
        values = (targets.astype(np.uint64)[:, None] + 1) * weights
        values ^= values >> np.uint64(29)
        values *= np.uint64(0xBF58476D1CE4E5B9)
        values ^= values >> np.uint64(32)
        mixed[tokens] += values
        is_taken[tokens] = True
    token_class = np.full(vocab_size, -1, dtype=np.int64)
    taken = np.flatnonzero(is_taken)
    if not len(taken):
        return token_class, 0
    _, found = np.unique(mixed[taken], axis=0, return_inverse=True)
    token_class[taken] = found.reshape(-1)
    return token_class, int(found.max()) + 1


def _distance(source: Ints, target: Ints, accepting: npt.NDArray[np.bool_]) -> Ints:
    """``(Q,)``: the fewest tokens to an accepting state."""
    pairs = np.unique(np.stack([source, target]), axis=1)
    distance = np.where(accepting, 0, NEVER).astype(np.int64)
    while True:
        shorter = distance.copy()
        np.minimum.at(shorter, pairs[0], distance[pairs[1]] + 1)
        shorter = np.minimum(shorter, NEVER)
        if (shorter == distance).all():
            return distance
        distance = shorter


def _forced(automaton: ByteAutomaton) -> list[bytes]:
    """The bytes with which all continuations of each state begin."""
    is_open = automaton.next_state >= 0
    is_forced = (is_open.sum(axis=1) == 1) & ~automaton.accepting
    byte = is_open.argmax(axis=1)
    found: list[bytes] = []
    for state in range(len(byte)):
        data, seen = bytearray(), set()
        while is_forced[state] and state not in seen:
            seen.add(state)
            data.append(byte[state])
            state = automaton.next_state[state, byte[state]]
        found.append(bytes(data))
    return found
