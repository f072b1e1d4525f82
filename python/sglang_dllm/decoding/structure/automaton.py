"""The automaton over tokens that a structured answer has to satisfy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from sglang_dllm.decoding.structure.arcs import Arcs, Bools, Ints, arcs_of

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
        has_free_text: text that is no structure may be in an answer.
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
    has_free_text: bool = False
    _on_device: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def arcs(self) -> Arcs:
        """The edges as the programme reads them."""
        return arcs_of(self)

    @property
    def eos_class(self) -> int:
        """The class of every EOS. They do the same, so that any of them is as good."""
        return int(self.edge_class[-1])

    @cached_property
    def class_size(self) -> Ints:
        """``(num_classes + 1,)``: the tokens of each class."""
        return np.bincount(self.token_class, minlength=self.num_classes + 1)

    @property
    def num_bytes(self) -> int:
        """The memory of its arrays, and of its arcs, which are made for it."""
        arrays = [*vars(self).values(), *self.arcs]
        sizes = [one.nbytes for one in arrays if isinstance(one, np.ndarray)]
        return sum(sizes) + sum(map(len, self.forced))

    def token_class_on(self, device: torch.device) -> torch.Tensor:
        """``token_class`` ``(V,)`` int64 on a device. All requests share it."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.token_class).to(device)
        return self._on_device[device]

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.accepting)

    @property
    def min_tokens(self) -> int:
        """The fewest tokens of a valid answer, without an EOS."""
        return int(self.distance[self.start])

    def follow(self, state: int | None, tokens: Iterable[int]) -> int | None:
        """The state behind some tokens; None where a state does not take one."""
        for token in tokens:
            if state is None:
                return None
            key = state * self.arcs.width + int(self.token_class[token])
            at = int(self.arcs.edge_key.searchsorted(key))
            if at == len(self.edge_target) or self.arcs.edge_key[at] != key:
                return None
            state = int(self.edge_target[at])
        return state

    def takes(self, tokens: list[int]) -> bool:
        """True if these tokens are a valid answer."""
        state = self.follow(self.start, tokens)
        return state is not None and bool(self.accepting[state])
