"""The record of a reference run: its answer and what every forward did."""

from __future__ import annotations

from dataclasses import dataclass, field

Window = tuple[int, int]  # rows [lo, hi) of the canvas


@dataclass(frozen=True)
class Forward:
    """The input and the effect of one forward; positions from the answer's start."""

    candidates: list[int]
    committed: list[int]
    stale: list[int]  # committed positions that the EOS rule had already filled
    mask_argmax: list[int]  # committed positions where rule (b) changed the token
    forced: list[int]  # committed only as the lowest entropy of a group, for progress
    eos_at: int | None  # first EOS the early-stop rule saw before this forward
    blocks: list[tuple[int, bool]]  # (left, active) per block, prompt block first
    # Smallest distance to another outcome: an entropy to the threshold, the two lowest
    # entropies where one was forced (nats), the two best logits of a committed token.
    # A parity failure where this is around rounding error is noise, not a bug.
    margin: float


@dataclass(frozen=True)
class Result:
    """A finished answer of G ids."""

    ids: list[int]
    nfe: int
    # Forward (0-based) that committed each id; None for an id the EOS rule filled in.
    commit_order: list[int | None]
    trace: list[Forward] = field(repr=False)
    # An EOS from here on ends the answer: behind all text that the request gave.
    ends_from: int = 0
    # Rows of the canvas that forwards computed, and that they took from the cache.
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0  # forwards of all rows, with a cache; 0 without
    # The rows each forward recomputed, counted from the canvas's start; None: all.
    windows: list[Window | None] = field(default_factory=list, repr=False)


@dataclass
class Block:
    """One block of the canvas. `active` is d3LLM's `is_complete`: fully activated."""

    start: int
    end: int
    left: int  # masks remaining, as the loop believes: a stale commit can undercount
    total: int
    active: bool

    @property
    def progress(self) -> float:
        # The prompt block of an empty prompt counts as decoded.
        return 1 - self.left / self.total if self.total else 1.0
