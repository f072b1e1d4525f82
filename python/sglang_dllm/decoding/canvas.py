"""One request's canvas as the host knows it: its tokens, its counters, its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SamplingOptions:
    """How a position's token is drawn once the policy accepts the position.

    Temperature 0 is the argmax. Entropies never see any of these.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


# Compared by identity: two requests may ask the same.
@dataclass(eq=False)
class Canvas:
    """Prompt and answer of one request, as of the last step that was read back.

    The canvas itself is a row of ``CanvasBatch`` on the device; the decoder writes this
    record after each step, nobody else does.

    Attributes:
        ids: int64 ``(prompt_len + max_new_tokens,)``: prompt, then the answer,
            mask tokens where nothing is committed yet.
        masked: bool, same shape: answer positions not committed. A mask token in
            the prompt is text and never masked.
        ignore_eos: decode and return the whole canvas.
        ends_at_eos: the canvas is done once its first EOS and all before it are
            committed, whatever is still masked behind.
        has_cache: its forwards may be windows over kept keys and values.
        num_rows: of a forward that it takes; 2 with guidance.
        kv_slots: ``(L,)`` int64: the pool's slots of its positions, on the device;
            None while it has none.
        req_pool_index: the request's row in SGLang's table of slots.
        done: no forward is needed any more.
        failure: what its algorithm raised.
        window: half-open range of positions that the next forward recomputes.
        num_candidates: positions that the next forward decides on.
        num_forwards: denoising steps run.
        num_committed: answer positions filled by the policy (not by an EOS fill).
        tokens_computed, tokens_cached: positions whose hidden states forwards computed,
            and whose keys and values they took from the cache, summed over forwards.
        full_refreshes: forwards over the whole canvas, of a canvas with a cache.
        cut_short: whether ``max_forwards`` committed what its algorithm would not have.
        num_emitted: length of the contiguous committed prefix handed out so far.
    """

    ids: IdArray
    prompt_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    ignore_eos: bool = False
    ends_at_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    has_cache: bool = False
    num_rows: int = 1
    kv_slots: Any = None
    req_pool_index: int = -1
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
        ignore_eos: bool = False,
        sampling: SamplingOptions | None = None,
        **others: Any,
    ) -> Canvas:
        """A canvas of ``len(prompt_ids) + max_new_tokens`` tokens, nothing decoded."""
        prompt_len = len(prompt_ids)
        ids = np.full(prompt_len + max_new_tokens, mask_id, dtype=np.int64)
        ids[:prompt_len] = prompt_ids
        return cls(
            ids,
            prompt_len,
            mask_id,
            eos_ids,
            ignore_eos,
            sampling=sampling or SamplingOptions(),
            **others,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_len(self) -> int:
        return len(self.ids) - self.prompt_len

    def place(self, kv_slots: Any, req_pool_index: int) -> None:
        """Note the slots that admission took.

        Args:
            kv_slots: ``(L,)`` int64, on the device.
            req_pool_index: the request's row in SGLang's table of slots.
        """
        self.kv_slots, self.req_pool_index = kv_slots, req_pool_index

    def fail(self, message: str) -> None:
        """Mark the request as failed. The first failure is the one that is answered."""
        if self.failure is None:
            self.failure = message

    def take_committed_prefix(self) -> IdArray:
        """The tokens by which the contiguous committed prefix grew; each once."""
        start = self.prompt_len + self.num_emitted
        masked = self.masked[start:]
        grown = int(masked.argmax()) if masked.any() else len(masked)
        self.num_emitted += grown
        return self.ids[start : start + grown]
