"""EntropyThreshold and FullAttnMultiBlock: one denoising step for many canvases.

Sources: d3LLM ``generate`` (single block) and ``generate_multi_block``, their Dream
twins, and dParallel's entropy threshold. The two algorithms differ only in the
progress at which the next block joins (``config``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_dllm.config import DecodeConfig
from sglang_dllm.decoding.blocks import Blocks, Step
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.sampling import counter_uniform, draw_tokens
from sglang_dllm.decoding.selection import select_by_entropy
from sglang_dllm.decoding.statistics import argmax_and_entropy
from sglang_dllm.families import ModelFacts


class MultiBlockDecoder:
    """Decides and commits one denoising step; owns no request."""

    def __init__(self, config: DecodeConfig, facts: ModelFacts) -> None:
        self.config = config
        self.facts = facts

    def start(self, canvas: Canvas) -> Blocks:
        """The block pipeline of a new canvas."""
        return Blocks(
            canvas,
            self.config.block_size,
            self.config.block_add_progress,
            self.config.activate_progress,
        )

    def rows(self, batch: Sequence[Blocks], starts: Sequence[int]) -> torch.Tensor:
        """Which rows of the packed hidden states predict the candidates.

        Args:
            batch: canvases whose step has begun.
            starts: index of each canvas's first token in the packed batch.

        Returns:
            ``(N,)`` int64 on the CPU: candidates of all canvases, in order.
        """
        shift = self.facts.family.shift
        return torch.from_numpy(
            np.concatenate(
                [
                    start + np.maximum(_step(blocks).candidates - shift, 0)
                    for blocks, start in zip(batch, starts, strict=True)
                ]
            )
        )

    def commit_step(self, logits: torch.Tensor, batch: Sequence[Blocks]) -> None:
        """Commit what one forward decides, in every canvas of the batch.

        Args:
            logits: ``(N, V)`` float, the rows named by ``rows``.
            batch: the same canvases in the same order; written in place.
        """
        device = logits.device
        steps = [_step(blocks) for blocks in batch]
        counts = [len(step.candidates) for step in steps]
        positions = np.concatenate([step.candidates for step in steps])
        canvas_index = np.repeat(np.arange(len(batch)), counts)
        forced = np.array([step.forced for step in steps])[canvas_index]
        in_forced = (positions >= forced[:, 0]) & (positions < forced[:, 1])
        tokens, entropy = argmax_and_entropy(logits, self.facts.mask_id)
        accepted = select_by_entropy(
            entropy,
            torch.from_numpy(canvas_index).to(device),
            torch.from_numpy(in_forced).to(device),
            torch.full(
                (len(batch),),
                self.config.threshold,
                dtype=torch.float64,
                device=device,
            ),
            inclusive=self.facts.family.inclusive,
            global_minimum=self.facts.family.global_minimum,
        )
        self._sample(logits, tokens, batch, canvas_index, positions)
        # The one place a step waits for the device.
        picked, token_ids = torch.stack([accepted.long(), tokens]).cpu().numpy()
        first = 0
        for blocks, step, count in zip(batch, steps, counts, strict=True):
            chosen = picked[first : first + count].astype(bool)
            blocks.commit(
                step.candidates[chosen], token_ids[first : first + count][chosen]
            )
            blocks.canvas.num_forwards += 1
            first += count

    def _sample(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        batch: Sequence[Blocks],
        canvas_index: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Replace the argmax by a draw, in place, where the temperature is not 0."""
        options = [blocks.canvas.sampling for blocks in batch]
        sampled = np.array([not o.greedy for o in options])[canvas_index]
        if not sampled.any():
            return
        device = logits.device
        rows = torch.from_numpy(np.flatnonzero(sampled)).to(device)
        owner = canvas_index[sampled]

        def per_row(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)[owner].to(device)

        # Counted from the answer's start: a prompt's length changes no draw.
        offsets = np.array([blocks.canvas.prompt_len for blocks in batch])[owner]
        tokens[rows] = draw_tokens(
            logits[rows],
            self.facts.mask_id,
            per_row([o.temperature for o in options], torch.float64),
            per_row([o.top_p for o in options], torch.float64),
            per_row([o.top_k for o in options], torch.int64),
            counter_uniform(
                per_row([o.seed for o in options], torch.int64),
                per_row([b.canvas.num_forwards for b in batch], torch.int64),
                torch.from_numpy(positions[sampled] - offsets).to(device),
            ),
        )


def _step(blocks: Blocks) -> Step:
    assert blocks.step is not None, "the step has not begun"
    return blocks.step
