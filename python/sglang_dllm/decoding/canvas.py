"""One request's canvas as the host knows it: its tokens, its counters, its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_dllm.decoding.history import BoolArray, History, IdArray
from sglang_dllm.decoding.length_plan import LengthPlan, Resize
from sglang_dllm.decoding.progress import Progress
from sglang_dllm.decoding.reveals import Revealed, Reveals
from sglang_dllm.decoding.scored import Scored
from sglang_dllm.decoding.structure.structure import Structure

if TYPE_CHECKING:
    from sglang_dllm.decoding.token_edits import TokenEdits


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn: temperature 0 is the argmax. Statistics see no cut."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


# Compared by identity: two requests may ask the same.
@dataclass(eq=False)
class Canvas:
    """Prompt and answer of one request, as of the last step that the host knows.

    The canvas itself is a row of a ``CanvasBatch`` on the device. The denoiser updates
    this record after each step through its methods.

    A canvas that is resized begins anew on what is left of it: ``prompt_len`` moves to
    its first block with a mask, and what is committed in front of it counts as prompt.

    Attributes:
        ids: ``(L,)`` int64: the prompt, then the answer. A position that is not
            committed holds the mask token.
        prompt_len: tokens in front of the part that is decoded.
        masked: ``(L,)`` bool: answer positions that are not committed. A mask token in
            the prompt is text and never masked.
        fixed: ``(L,)`` bool: positions that the request gave, the prompt among them.
        answer_start: tokens of the request's prompt. The answer's positions count from
            there.
        length: how the canvas changes its length; None where it keeps it.
        resize: the change that it waits for. No forward may run before it.
        measures: the next forward commits nothing; a length rule measures it.
        num_padding: EOS at the end that a length rule put there. They end nothing.
        max_forwards: forwards after which nothing is resized; None for no limit.
        num_shown: answer positions that may be handed out; None for all.
        ignore_eos: decode and return the whole canvas.
        ends_at_eos: the canvas is done when its first EOS and everything before it
            are committed. Masks behind the EOS stay.
        has_cache: its forwards may be windows over keys and values in the pool.
        num_windows: windows of a forward that it takes; 2 with guidance.
        kv_slots: ``(L,)`` int64 on the device: the pool's slots of its positions.
        held_slots: ``(H,)`` int64: all slots that the request holds, L or more.
        req_pool_index: SGLang's request slot.
        done: no forward is needed any more.
        failure: why the request cannot go on.
        window: half-open range of positions that the next forward computes.
        num_candidates, span_end: positions on which the next forward decides, and the
            end of the span that they are in, from ``prompt_len``.
        num_forwards: denoising steps that were run (NFE).
        num_committed: answer positions that the algorithm filled. Positions that an
            EOS filled do not count.
        tokens_computed, tokens_cached: positions whose hidden states forwards
            computed, and positions whose keys and values they took from the pool,
            summed over forwards.
        full_refreshes: forwards over the whole canvas, of a canvas with a cache.
        cut_short: ``max_forwards`` committed what the algorithm would not have.
        num_emitted: length of the committed prefix that was handed out.
        history: of a watched canvas. None: nobody watches it.
        edits: what the request changes of the logits.
        reveals: of a canvas whose request asks for log-probabilities.
        scored: the continuation that it scores. None of a canvas that generates.
        structure: the form that its answer must have. None: any.
        algorithm, cache: their names, for metrics and logs.
    """

    ids: IdArray
    prompt_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    ignore_eos: bool = False
    ends_at_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    has_cache: bool = False
    num_windows: int = 1
    length: LengthPlan | None = None
    resize: Resize | None = None
    measures: bool = False
    num_padding: int = 0
    max_forwards: int | None = None
    num_shown: int | None = None
    kv_slots: torch.Tensor | None = None
    held_slots: torch.Tensor | None = None
    req_pool_index: int | None = None
    done: bool = False
    failure: str | None = None
    window: tuple[int, int] = (0, 0)
    num_candidates: int = 0
    span_end: int = 0
    num_forwards: int = 0
    num_committed: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0
    cut_short: bool = False
    num_emitted: int = 0
    history: History | None = None
    reveals: Reveals | None = None
    scored: Scored | None = None
    structure: Structure | None = None
    algorithm: str = ""
    cache: str = ""
    edits: TokenEdits | None = None
    answer_start: int = field(init=False)
    masked: BoolArray = field(init=False)
    fixed: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.prompt_len <= len(self.ids)
        self.answer_start = self.prompt_len
        self.masked = np.arange(len(self.ids)) >= self.prompt_len
        self.fixed = ~self.masked

    @classmethod
    def from_prompt(
        cls,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        mask_id: int,
        eos_ids: tuple[int, ...],
        **others: Any,
    ) -> Canvas:
        """A canvas of ``len(prompt_ids) + max_new_tokens`` tokens, nothing decoded."""
        prompt_len = len(prompt_ids)
        ids = np.full(prompt_len + max_new_tokens, mask_id, dtype=np.int64)
        ids[:prompt_len] = prompt_ids
        return cls(ids, prompt_len, mask_id, eos_ids, **others)

    @classmethod
    def from_template(
        cls, prompt_ids: Sequence[int], template: Sequence[int], **others: Any
    ) -> Canvas:
        """A canvas whose answer is partly given.

        Args:
            template: the answer's token ids, -1 for a mask.
            others: as in ``from_prompt``.
        """
        canvas = cls.from_prompt(prompt_ids, len(template), **others)
        given = np.asarray(template, dtype=np.int64)
        is_given, start = given >= 0, canvas.prompt_len
        canvas.ids[start:][is_given] = given[is_given]
        canvas.masked[start:] = ~is_given
        canvas.fixed[start:] = is_given
        return canvas

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_len(self) -> int:
        """Tokens of the part that is decoded."""
        return len(self.ids) - self.prompt_len

    @property
    def is_open(self) -> bool:
        """True if an EOS may end the answer: its last position is not given."""
        return not self.fixed[-1]

    @property
    def ends_from(self) -> int:
        """The first position at which an EOS ends the answer, from ``prompt_len``.

        It is behind all given text.
        """
        (given,) = self.fixed.nonzero()
        return max(0, int(given[-1]) + 1 - self.prompt_len) if len(given) else 0

    @property
    def is_out_of_forwards(self) -> bool:
        """True if ``max_forwards`` ended the decoding."""
        return self.max_forwards is not None and self.num_forwards >= self.max_forwards

    @property
    def is_complete(self) -> bool:
        """True if every token that may be handed out is final and was handed out."""
        most = len(self) - self.answer_start
        if self.num_shown is not None:
            most = min(most, self.num_shown)
        return self.done and self.resize is None and self.num_emitted >= most

    @property
    def has_ended(self) -> bool:
        """True if an EOS ends the answer, and all before it is committed."""
        if self.ignore_eos:
            return False
        position = np.arange(len(self))
        behind = position >= self.prompt_len + self.ends_from
        behind &= position < len(self) - self.num_padding
        is_end = np.isin(self.ids, self.eos_ids) & ~self.masked & behind
        (ends,) = is_end.nonzero()
        return bool(len(ends)) and not self.masked[: ends[0]].any()

    @property
    def is_guided(self) -> bool:
        """True if each forward computes the unconditional canvas too."""
        return self.num_windows == 2

    @property
    def placed_slots(self) -> torch.Tensor:
        """``kv_slots`` of a canvas that has them, as every admitted one does."""
        assert self.kv_slots is not None, "admission places a canvas first"
        return self.kv_slots

    def place(self, held_slots: torch.Tensor, req_pool_index: int) -> None:
        """Note the slots that the request holds: one for each position, or more."""
        self.held_slots, self.req_pool_index = held_slots, req_pool_index
        self.kv_slots = held_slots[: len(self)]

    def lose_slots(self) -> None:
        """Note that the slots are gone, and the keys and values with them."""
        self.held_slots = self.kv_slots = self.req_pool_index = None
        self.expect_full_window()

    def apply_resize(self) -> None:
        """Take over the change of length; the algorithm has to begin anew."""
        assert self.resize is not None and self.length is not None
        change, self.resize = self.resize, None
        start = self._next_start()
        self._replace(change.at, change.remove, change.insert + change.num_eos)
        self._pad(change.at + change.insert, change.num_eos)
        lost = max(0, len(self) - self.answer_start - self.length.cap)
        self._replace(self.length.cap, lost, 0)
        self.num_padding = max(0, self.num_padding - lost)
        self.prompt_len = min(start, len(self))
        committed = ~self.masked & ~self.fixed
        self.num_committed = int(committed.sum()) - self.num_padding
        self.begin()
        if self.held_slots is not None:
            self.kv_slots = self.held_slots[: len(self)]

    def _replace(self, at: int, remove: int, insert: int) -> None:
        """Put ``insert`` masks in the place of ``remove`` answer positions."""
        if remove == insert == 0:
            return
        if self.history is not None:
            self.history.note_resize(at, remove, insert)
        if self.reveals is not None:
            self.reveals.replace(at, remove, insert)
        at += self.answer_start
        for name, value in (("ids", self.mask_id), ("masked", True), ("fixed", False)):
            old = getattr(self, name)
            new = np.full(insert, value, dtype=old.dtype)
            setattr(self, name, np.concatenate([old[:at], new, old[at + remove :]]))

    def _pad(self, at: int, num_eos: int) -> None:
        """Commit EOS at answer positions that hold masks."""
        end = self.answer_start + at + num_eos
        places = slice(end - num_eos, end)
        before = self._known(places)
        self.ids[places], self.masked[places] = self.eos_ids[0], False
        if self.history is not None and num_eos:
            self.history.note(self.num_forwards, before, self.ids[places], None, at)
        self.num_padding += num_eos

    def _known(self, places: slice) -> IdArray:
        """Their tokens, -1 where masked."""
        return np.where(self.masked[places], -1, self.ids[places])

    def _next_start(self) -> int:
        """The start of the first block with a mask, the end where none has one. Blocks
        count from where the algorithm began."""
        assert self.length is not None
        masked = self.masked[self.prompt_len :]
        if not masked.any():
            return len(self)
        size = self.length.block_size
        return self.prompt_len + int(masked.argmax()) // size * size

    def begin(self) -> None:
        """Find out whether the canvas is done, or only measured first.

        A canvas without a mask is measured once more, and may grow by it, unless all of
        it was there before. No forward is left to measure where the next one is the
        last.
        """
        is_full = not self.masked.any()
        is_last = self.max_forwards == self.num_forwards + 1
        measures = self.length is not None and self.length.measures_first
        measures |= is_full and self.prompt_len < len(self)
        self.measures = measures and not is_last
        self.done = is_full and not self.measures
        self.window = (0, len(self))

    def require(self, structure: Structure) -> None:
        """Note the form of the answer, and commit the tokens that follow from it."""
        self.structure = structure
        at, tokens = structure.known_tokens(self)
        self.ids[at], self.masked[at] = tokens, False

    def watch(self) -> None:
        """Keep a history from now on."""
        self.history = History()

    def reveal(self, num_top: int) -> None:
        """Keep the log-probabilities of its tokens, and of the best alternatives."""
        self.reveals = Reveals(len(self) - self.answer_start, num_top)

    @property
    def asks_logprobs(self) -> bool:
        """True if the host wants to know how sure each commit was."""
        return self.history is not None or self.reveals is not None

    def fail(self, message: str) -> None:
        """End the request with a message. The first failure stays."""
        self.failure = self.failure or message

    def count_forward(self) -> None:
        """Count what the forward over ``window`` computed."""
        start, end = self.window
        self.tokens_computed += end - start
        self.tokens_cached += len(self) - (end - start)
        self.full_refreshes += self.has_cache and end - start == len(self)

    def expect_full_window(self) -> None:
        """The keys and values in the pool are lost: the next window is full."""
        self.window = (0, len(self))

    def update(
        self,
        answer: IdArray,
        progress: Progress,
        measured: Sequence[float] = (),
        revealed: Revealed | None = None,
    ) -> None:
        """Take over what a step committed, and the next step.

        Args:
            answer: ``(answer_len,)`` int64; negative where a position is masked.
            measured: the numbers of the length rule.
            revealed: the tokens that the step committed. None where the group has no
                canvas that asks for it.
        """
        if self.asks_logprobs:
            first = self.prompt_len - self.answer_start
            before = self._known(slice(self.prompt_len, None))
            if self.history is not None:
                logprobs = None if revealed is None else revealed.spread(len(answer))
                forward = progress.num_forwards
                self.history.note(forward, before, answer, logprobs, first)
            if self.reveals is not None:
                self.reveals.note(before, answer, revealed, first)
        ran = progress.num_forwards > self.num_forwards
        self.measures = self.measures and not ran
        was_full = self.window == (0, len(self))
        masked = answer < 0
        self.masked[self.prompt_len :] = masked
        self.ids[self.prompt_len :] = np.where(masked, self.mask_id, answer)
        self.num_forwards = progress.num_forwards
        self.num_committed = progress.num_committed
        self.cut_short, self.done = progress.cut_short, progress.done
        self.num_candidates, self.window = progress.num_candidates, progress.window
        self.span_end = progress.span_end
        # A rule measures the whole answer, which a smaller window does not compute.
        may_resize = ran and (was_full or not measured) and not self.is_out_of_forwards
        if self.length is not None and may_resize:
            self.resize = self.length.next_resize(self, measured)

    def take_committed_prefix(self) -> IdArray:
        """The tokens by which the committed prefix grew, each once. Tokens that a
        change of length takes away are not among them."""
        start = self.answer_start + self.num_emitted
        most = len(self.ids) if self.num_shown is None else self.num_shown
        if self.resize is not None:
            most = min(most, self.resize.at)
        if self.length is not None and not (self.done and self.resize is None):
            most = min(most, self.length.num_kept(self))
        masked = self.masked[start : self.answer_start + most]
        grown = int(masked.argmax()) if masked.any() else len(masked)
        self.num_emitted += grown
        return self.ids[start : start + grown]
