"""One request's canvas: its tokens, what is committed, when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class Canvas:
    """Prompt and answer of one request; the scheduler's thread is the only writer.

    Attributes:
        ids: int64 ``(prompt_len + max_new_tokens,)``: prompt, then the answer,
            mask tokens where nothing is committed yet.
        masked: bool, same shape: answer positions not committed. A mask token in
            the prompt is text and never masked.
        ignore_eos: decode and return the whole canvas.
        num_forwards: denoising steps run.
        num_committed: answer positions filled by the policy (not by an EOS fill).
        cut_short: whether ``max_forwards`` committed what its algorithm would not have.
        num_emitted: length of the contiguous committed prefix handed out so far.
    """

    ids: IdArray
    prompt_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    ignore_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    num_forwards: int = 0
    num_committed: int = 0
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
            sampling or SamplingOptions(),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_len(self) -> int:
        return len(self.ids) - self.prompt_len

    def commit(self, positions: IdArray, token_ids: IdArray) -> None:
        """Fill canvas positions (absolute indices) with tokens."""
        self.ids[positions] = token_ids
        self.num_committed += int(self.masked[positions].sum())
        self.masked[positions] = False

    def first_eos(self) -> int | None:
        """Absolute index of the first EOS in the answer, or None."""
        answer = self.ids[self.prompt_len :]
        hits = np.flatnonzero(np.isin(answer, self.eos_ids))
        return self.prompt_len + int(hits[0]) if len(hits) else None

    def fill_after(self, position: int) -> None:
        """Make everything behind an EOS that EOS (d3LLM's early stop)."""
        self.ids[position + 1 :] = self.ids[position]
        self.masked[position + 1 :] = False

    def take_committed_prefix(self) -> IdArray:
        """The tokens by which the contiguous committed prefix grew; each once."""
        start = self.prompt_len + self.num_emitted
        masked = np.flatnonzero(self.masked[start:])
        end = start + int(masked[0]) if len(masked) else len(self.ids)
        self.num_emitted = end - self.prompt_len
        return self.ids[start:end]

    @property
    def finished(self) -> bool:
        """Whether no answer position is masked."""
        return not bool(self.masked[self.prompt_len :].any())
