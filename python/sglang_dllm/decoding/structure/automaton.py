"""The automaton over tokens that a structured answer has to satisfy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEVER = 1 << 40
"""The ``distance`` of a state from which no accepting state can be reached."""


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton with Q states and E edges over classes of tokens.

    Tokens that lead to the same state from every state are one class. An answer is
    valid if its tokens lead from ``start`` to an accepting state. An EOS leads from an
    accepting state to ``end``, which is accepting and has EOS edges to itself alone.

    Attributes:
        start, end: states.
        token_class: ``(V,)``: the class of each token; ``num_classes`` for tokens that
            no state takes, among them the mask token and special tokens.
        edge_source, edge_class, edge_target: ``(E,)``, sorted by source, then by class.
        accepting: ``(Q,)``.
        distance: ``(Q,)``: the fewest tokens to an accepting state, 0 for one.
        forced: ``(Q,)`` byte strings: all continuations of a state begin with it.
    """

    start: int
    end: int
    token_class: Ints
    num_classes: int
    edge_source: Ints
    edge_class: Ints
    edge_target: Ints
    accepting: Bools
    distance: Ints
    forced: tuple[bytes, ...]

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.accepting)

    @property
    def min_tokens(self) -> int:
        """The fewest tokens of a valid answer, without an EOS."""
        return int(self.distance[self.start])

    def follow(self, state: int, tokens: list[int]) -> int | None:
        """The state behind some tokens; None where a state does not take one."""
        for token in tokens:
            first, last = np.searchsorted(self.edge_source, [state, state + 1])
            wanted = self.token_class[token]
            at = first + np.searchsorted(self.edge_class[first:last], wanted)
            if at == last or self.edge_class[at] != wanted:
                return None
            state = int(self.edge_target[at])
        return state

    def takes(self, tokens: list[int]) -> bool:
        """True if these tokens are a valid answer."""
        state = self.follow(self.start, tokens)
        return state is not None and bool(self.accepting[state])
