"""A plain decoding loop: LLaDA's `generate` with d3LLM's entropy rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeRule:
    """The rule that fills a canvas. The ids come from the checkpoint."""

    mask_id: int
    eos_id: int
    threshold: float = 0.0
    canvas_len: int = 64
    block_size: int = 32


@dataclass(frozen=True)
class Decoded:
    """One response before its first EOS, and the forwards it took."""

    ids: list[int]
    num_forwards: int

    @property
    def tokens_per_forward(self) -> float:
        return len(self.ids) / self.num_forwards


@torch.inference_mode()
def decode(
    logits_of: Callable[[Tensor], Tensor], prompts: Tensor, rule: DecodeRule
) -> list[Decoded]:
    """Answer `prompts: (B, P)` int64, all of one length. Rows are independent.

    `logits_of` maps ids `(B, L)` to logits `(B, L, V)`. A row is finished when no mask
    stands before its first EOS.
    """
    prompt_len = prompts.shape[1]
    answer = torch.full((len(prompts), rule.canvas_len), rule.mask_id)
    canvas = torch.cat((prompts, answer), dim=1)
    place = torch.arange(rule.canvas_len)[None]
    forwards = torch.zeros(len(prompts), dtype=torch.int64)
    while True:
        answer = canvas[:, prompt_len:]
        masks = answer == rule.mask_id
        first_mask = first_place(masks)
        live = (first_mask < first_place(answer == rule.eos_id)).nonzero()[:, 0]
        if not len(live):
            break
        logits = logits_of(canvas[live])[:, prompt_len:].double()
        block_end = (first_mask[live] // rule.block_size + 1) * rule.block_size
        candidates = masks[live] & (place < block_end[:, None])
        tokens, accepted = select(logits, candidates, rule)
        answer[live] = torch.where(accepted, tokens, answer[live])
        forwards[live] += 1
    ends = first_place(answer == rule.eos_id).tolist()
    return [
        Decoded(row[:end], count)
        for row, end, count in zip(
            answer.tolist(), ends, forwards.tolist(), strict=True
        )
    ]


def first_place(found: Tensor) -> Tensor:
    """Index of the first true entry in each row of `(B, L)`, or L."""
    index = torch.arange(found.shape[1]).expand_as(found)
    return torch.where(found, index, found.shape[1]).amin(1)


def select(
    logits: Tensor, candidates: Tensor, rule: DecodeRule
) -> tuple[Tensor, Tensor]:
    """Tokens and the accepted places, both `(B, L)`, from float64 `(B, L, V)`.

    d3LLM's rule for LLaDA accepts every candidate with at most the threshold's entropy
    (nats), and always the candidate with the least.
    """
    p = logits.softmax(-1)
    entropy = -(p * (p + 1e-12).log()).sum(-1)
    entropy = torch.where(candidates, entropy, torch.inf)
    accepted = candidates & (entropy <= rule.threshold)
    accepted.scatter_(1, entropy.argmin(1, keepdim=True), True)
    logits = logits.index_fill(2, torch.tensor([rule.mask_id]), -torch.inf)
    return logits.argmax(-1), accepted
