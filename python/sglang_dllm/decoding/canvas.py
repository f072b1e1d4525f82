"""One request's canvas as the host knows it: its tokens, its counters, its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sglang_dllm.decoding.history import BoolArray, FloatArray, History, IdArray


@dataclass(frozen=True)
class SamplingOptions:
    """How the token of a position is drawn.

    Temperature 0 is the argmax. Statistics never see top-p and top-k.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Progress:
    """The news of a canvas after a step.

    Attributes:
        num_forwards, num_committed, cut_short, done, num_candidates, window: as in
            ``Canvas``.
    """

    num_forwards: int
    num_committed: int
    cut_short: bool
    done: bool
    num_candidates: int
    window: tuple[int, int]


# Compared by identity: two requests may ask the same.
@dataclass(eq=False)
class Canvas:
    """Prompt and answer of one request, as of the last step that the host knows.

    The canvas itself is a row of a ``CanvasBatch`` on the device. The denoiser updates
    this record after each step through its methods.

    Attributes:
        ids: int64 ``(prompt_len + max_new_tokens,)``: the prompt, then the answer.
            A position that is not committed holds the mask token.
        masked: bool, same shape: answer positions that are not committed. A mask
            token in the prompt is text and never masked.
        ignore_eos: decode and return the whole canvas.
        ends_at_eos: the canvas is done when its first EOS and everything before it
            are committed. Masks behind the EOS stay.
        has_cache: its forwards may be windows over keys and values in the pool.
        num_windows: windows of a forward that it takes; 2 with guidance.
        kv_slots: ``(L,)`` int64 on the device: the pool's slots of its positions.
        req_pool_index: SGLang's request slot.
        done: no forward is needed any more.
        failure: why the request cannot go on.
        window: half-open range of positions that the next forward computes.
        num_candidates: positions on which the next forward decides.
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
    kv_slots: torch.Tensor | None = None
    req_pool_index: int | None = None
    done: bool = False
    failure: str | None = None
    window: tuple[int, int] = (0, 0)
    num_candidates: int = 0
    num_forwards: int = 0
    num_committed: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    full_refreshes: int = 0
    cut_short: bool = False
    num_emitted: int = 0
    history: History | None = None
    masked: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.prompt_len <= len(self.ids)
        self.masked = np.zeros(len(self.ids), dtype=np.bool_)
        self.masked[self.prompt_len :] = True

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

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_len(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def is_guided(self) -> bool:
        """True if each forward computes the unconditional canvas too."""
        return self.num_windows == 2

    @property
    def placed_slots(self) -> torch.Tensor:
        """``kv_slots`` of a canvas that has them, as every admitted one does."""
        assert self.kv_slots is not None, "admission places a canvas first"
        return self.kv_slots

    def place(self, kv_slots: torch.Tensor, req_pool_index: int) -> None:
        """Note the slots that admission took."""
        self.kv_slots, self.req_pool_index = kv_slots, req_pool_index

    def watch(self) -> None:
        """Keep a history from now on."""
        self.history = History()

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
        self, answer: IdArray, progress: Progress, logprobs: FloatArray | None = None
    ) -> None:
        """Take over what a step committed, and the next step.

        Args:
            answer: ``(answer_len,)`` int64; negative where a position is masked.
            logprobs: ``(answer_len,)`` float64: of the tokens that the step committed,
                NaN elsewhere. None where the group has no watched canvas.
        """
        if self.history is not None:
            before = self.masked[self.prompt_len :]
            self.history.note(progress.num_forwards, before, answer, logprobs)
        masked = answer < 0
        self.masked[self.prompt_len :] = masked
        self.ids[self.prompt_len :] = np.where(masked, self.mask_id, answer)
        self.num_forwards = progress.num_forwards
        self.num_committed = progress.num_committed
        self.cut_short, self.done = progress.cut_short, progress.done
        self.num_candidates, self.window = progress.num_candidates, progress.window

    def take_committed_prefix(self) -> IdArray:
        """The tokens by which the committed prefix grew; each once."""
        start = self.prompt_len + self.num_emitted
        masked = self.masked[start:]
        grown = int(masked.argmax()) if masked.any() else len(masked)
        self.num_emitted += grown
        return self.ids[start : start + grown]
