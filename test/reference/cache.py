"""When a cached canvas is computed again, and how much of it: the published strategies.

Approximate decoding: most forwards compute a window of the canvas over remembered keys
and values of the rest (`reference.memory`). A strategy says before each forward which
rows it computes. Most of them look at the *span* of the forward, the part of the answer
that is being decoded, [start, end) on the canvas: the block of a block-wise algorithm;
from the start of the block of the first candidate to the end of the furthest live block
of a multi-block one.

- `prefix`, `dual`: Fast-dLLM (arXiv 2505.22618), the second without what is behind.
- `vicinity`: dInfer (arXiv 2510.08666), the block and a few positions around it.
- `delayed`: d3LLM (arXiv 2601.07568), everything behind the blocks that have been
  finished for a while, and now and then all of it.

In all of them a window of a shifted model (Dream, DiffuLLaMA) starts one row earlier,
since the row before the first position is the one that predicts it; and the forward in
which `max_forwards` commits every mask left is full, those masks being anywhere.

Departures from the published code, on purpose:

(a) Fast-dLLM's loop (June 2025) runs at least two forwards a block, the second over a
    block that the first may have finished. Ours tests first: the same tokens.
(b) On Dream, Fast-dLLM commits the first position of a block from the full forward,
    whatever its confidence, and d3LLM lets the first row that is not cached read its
    own hidden state. Here the window starts one row earlier (dInfer's way).
(c) d3LLM appends the keys of a block twice where two blocks become stable at once. Here
    every position has one key.
(d) dInfer's iteration may run its window over a block that its full forward finished,
    and several iterations over a finished block (loop unrolling). Ours tests first.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from reference.memory import Memory
from reference.record import Window

Span = tuple[int, int]  # positions [start, end) of the canvas


class Strategy(Protocol):
    def next_window(self, n: int, span: Span, masked: list[int]) -> Window | None:
        """Rows of the n-th forward (from 1) of a request, None for a full one.

        masked: positions of the answer still to be committed, ascending; those that
        were filled in behind an EOS are not. Window ends may lie outside the canvas.
        """
        ...


class Prefix:
    """Everything from the block on; all of it where another block starts."""

    def __init__(self, shift: int, canvas_len: int) -> None:
        self.shift, self.canvas_len = shift, canvas_len
        self.full_start: int | None = None  # the span's at the last full forward

    def next_window(self, n: int, span: Span, masked: list[int]) -> Window | None:
        if span[0] != self.full_start:
            self.full_start = span[0]
            return None
        return self.rows(*span)

    def rows(self, start: int, end: int) -> Window:
        return start - self.shift, self.canvas_len


class Dual(Prefix):
    """The block only: what is behind it is remembered as well as what is before."""

    def rows(self, start: int, end: int) -> Window:
        return start - self.shift, end


class Vicinity:
    """The block and its neighbourhood: dInfer's `VicinityCacheIteration`.

    One iteration of dInfer is a full forward where the cache must be filled or updated,
    and then a window; both decide. Full forwards of the warm-up keep no keys.
    """

    def __init__(
        self,
        shift: int,
        *,
        prompt_len: int,
        prefix_look: int,
        after_look: int,
        warmup: int,
    ) -> None:
        self.shift, self.first_block = shift, prompt_len
        self.prefix_look, self.after_look = prefix_look, after_look
        self.warmup = warmup
        self.has_past = False
        self.block_start: int | None = None  # as require_update left it
        self.window_due: int | None = None  # in this block, to end an iteration

    def next_window(self, n: int, span: Span, masked: list[int]) -> Window | None:
        start, end = span
        if n <= self.warmup:
            return None
        if self.window_due != start and self._must_fill(start):
            self.has_past, self.window_due = True, start
            return None
        self.window_due = None
        return start - self.prefix_look - self.shift, end + self.after_look

    def _must_fill(self, start: int) -> bool:
        # Published so: an empty cache is filled without a look at the block.
        if not self.has_past:
            return True
        return self._require_update(start) and start != self.first_block

    def _require_update(self, start: int) -> bool:
        before, self.block_start = self.block_start, start
        return before != start


class Delayed:
    """Blocks from the canvas's start on are cached once they have been done for long.

    The prompt is the first block, done before the first forward. A block that is done
    is still computed for `delay` forwards, so that its keys and values know its tokens
    and those around it.
    """

    def __init__(
        self,
        shift: int,
        canvas_len: int,
        *,
        family: str,
        prompt_len: int,
        block_size: int,
        delay: int,
        refresh_interval: int,
    ) -> None:
        self.shift, self.canvas_len, self.family = shift, canvas_len, family
        self.delay, self.refresh_interval = delay, refresh_interval
        starts = range(prompt_len, canvas_len, block_size)
        answer = [(start, min(start + block_size, canvas_len)) for start in starts]
        self.blocks = [(0, prompt_len), *answer]
        # Number of the forward before which a block was first seen without a mask.
        self.done_at: list[int | None] = [0] + [None] * len(answer)
        # An empty prompt has nothing to compute.
        self.cached = [prompt_len == 0] + [False] * len(answer)
        self.cached_end = 0  # positions before it are cached

    def next_window(self, n: int, span: Span, masked: list[int]) -> Window | None:
        ready_end = self._walk(n, masked)
        if ready_end is not None:
            # The last time that what is now cached is computed.
            computed_from, self.cached_end = self.cached_end, ready_end
            return self._rows(computed_from)
        refresh = self._some_waits(masked) or n % self.refresh_interval == 0
        return None if refresh else self._rows(self.cached_end)

    def _rows(self, start: int) -> Window | None:
        return (start - self.shift, self.canvas_len) if start > 0 else None

    def _walk(self, n: int, masked: list[int]) -> int | None:
        """Cache the blocks whose time has come; the end of the last of them."""
        ready_end = None
        for b, (start, end) in enumerate(self.blocks):
            if end <= self.cached_end:
                continue
            if any(start <= i < end for i in masked):
                break
            done_at = self.done_at[b]
            if done_at is None:
                done_at = self.done_at[b] = n
            if n - done_at >= self.delay:
                if not self.cached[b]:
                    self.cached[b] = True
                    ready_end = end
            elif self.family == "llada":
                # Published so: the time of the blocks behind does not start yet.
                break
        return ready_end

    def _some_waits(self, masked: list[int]) -> bool:
        """True if some block is done but not cached."""
        for (start, end), done_at, cached in zip(
            self.blocks, self.done_at, self.cached, strict=True
        ):
            has_masks = any(start <= i < end for i in masked)
            if not has_masks and done_at is not None and not cached:
                return True
        return False


def strategy_of(
    options: dict[str, Any], *, family: str, prompt_len: int, canvas_len: int
) -> Strategy | None:
    """The strategy of one request, None without a cache.

    options: `cache` and the keys of that strategy, and the algorithm's `block_size`.
    """
    name = options.get("cache", "none")
    shift = 1 if family == "dream" else 0
    if name == "none":
        return None
    if name == "prefix":
        return Prefix(shift, canvas_len)
    if name == "dual":
        return Dual(shift, canvas_len)
    if name == "vicinity":
        return Vicinity(
            shift,
            prompt_len=prompt_len,
            prefix_look=options["prefix_look"],
            after_look=options["after_look"],
            warmup=options["warmup"],
        )
    if name == "delayed":
        return Delayed(
            shift,
            canvas_len,
            family=family,
            prompt_len=prompt_len,
            block_size=options["block_size"],
            delay=options["cache_delay_iter"],
            refresh_interval=options["refresh_interval"],
        )
    raise ValueError(f"cache: {name}")


class Forwards:
    """Runs the forwards of one request, full ones and windows, and records them."""

    def __init__(
        self,
        model: Any,
        options: dict[str, Any],
        *,
        family: str,
        prompt_len: int,
        canvas_len: int,
        max_forwards: int | None,
    ) -> None:
        """model: a `LogitsFn`; with a cache it needs `new_memory` too."""
        self.model, self.canvas_len = model, canvas_len
        self.max_forwards = max_forwards
        self.strategy = strategy_of(
            options, family=family, prompt_len=prompt_len, canvas_len=canvas_len
        )
        self.memory: Memory | None = model.new_memory() if self.strategy else None
        self.windows: list[Window | None] = []  # None: a full forward

    def run(self, ids: list[int], span: Span | None, masked: list[int]) -> torch.Tensor:
        """The usable logits (L, V) of one forward, NaN where not computed.

        span: None where the algorithm takes no cache.
        """
        window = self._next_window(span, masked)
        self.windows.append(window)
        tokens = torch.tensor(ids, dtype=torch.int64)
        if self.memory is None:
            return self.model(tokens)
        if window is None:
            return self.memory.full(tokens)
        return self.memory.window(tokens, *window)

    def _next_window(self, span: Span | None, masked: list[int]) -> Window | None:
        n = len(self.windows) + 1
        if self.strategy is None or n == self.max_forwards:
            return None
        if span is None:
            raise ValueError("an algorithm of the whole canvas takes no cache")
        window = self.strategy.next_window(n, span, masked)
        if window is None:
            return None
        lo, hi = window
        return max(lo, 0), min(hi, self.canvas_len)

    def record(self) -> dict[str, Any]:
        """The fields of a `Result` that tell what was computed."""
        everything = (0, self.canvas_len)
        computed = [hi - lo for lo, hi in (w or everything for w in self.windows)]
        return {
            "tokens_computed": sum(computed),
            "tokens_cached": len(computed) * self.canvas_len - sum(computed),
            "full_refreshes": computed.count(self.canvas_len) if self.strategy else 0,
            "windows": list(self.windows),
        }
