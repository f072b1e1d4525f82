"""One denoising step of a batch of canvases."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """One denoising step of R canvases whose answers are up to A tokens long.

    Attributes:
        candidates: ``(R, A)`` bool: the masked positions that the commit may fill.
        start, end: ``(R,)`` int64: the span that the algorithm decodes at present,
            half-open, from the answer's start. It holds all candidates. A cache
            computes it again.
    """

    candidates: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def check(self, num_canvases: int, max_answer_len: int) -> None:
        """Check what code from outside returned.

        Raises:
            ValueError: a tensor has another shape or dtype.
        """
        shape = (num_canvases, max_answer_len)
        if self.candidates.shape != shape or self.candidates.dtype != torch.bool:
            raise ValueError(f"Step.candidates must be bool {shape}")
        for name in ("start", "end"):
            tensor = getattr(self, name)
            if tensor.shape != shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(f"Step.{name} must be int64 {shape[:1]}")
