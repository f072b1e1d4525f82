"""``cache: dual`` (Fast-dLLM, arXiv 2505.22618): the block alone."""

from __future__ import annotations

import torch

from sglang_dllm.decoding.caches.base import Batch, RefreshState, Windows
from sglang_dllm.decoding.caches.prefix import Prefix
from sglang_dllm.decoding.step import Step


class Dual(Prefix):
    """Refreshes as ``prefix`` does; then computes the block, not what is behind it."""

    name = "dual"

    def choose(
        self, batch: Batch, state: RefreshState, step: Step
    ) -> tuple[Windows, torch.Tensor]:
        windows, is_full = super().choose(batch, state, step)
        return Windows(windows.start, batch.rows.prompt_len + step.end), is_full
