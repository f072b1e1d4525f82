"""The published loops that find the length of the answer themselves, one request.

`rho_eos` is rho-EOS (arXiv 2601.22527, `LLaDA_rho_EOS.generate`), `daedal` is DAEDAL
(arXiv 2508.00819, `LLaDA_DAEDAL.generate`), each with the decoding that its authors
built in: blocks, every token above a threshold, always the surest one. Batch 1,
temperature 0, no guidance. Plain lists and scalars.

Kept as published: the EOS confidence is read at all positions of the answer, committed
ones too; tokens behind the end of a shortened answer are lost; a shortened answer
without a mask is computed once more and may grow again; DAEDAL's second stage starts
with committed EOS tokens behind the masks, and an insertion pushes out what exceeds
the cap.

`max_steps` is rho-EOS's limit of forwards, which is the cap there: the loop then leaves
masks behind. None: no limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from reference.memory import LogitsFn

MAX_MULTIPLIER = 8
MAX_ADJUST_STEPS = 64


@dataclass
class Loop:
    """A finished loop, or one that is under way.

    Attributes:
        ids: the answer.
        lengths: the answer's length in each forward.
    """

    model: LogitsFn
    prompt_ids: list[int]
    ids: list[int]
    mask_id: int
    eos_id: int
    eos_check_tokens: int
    lengths: list[int] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        return len(self.lengths)

    def forward(self) -> torch.Tensor:
        """(G, V) float64 probabilities of the answer's positions."""
        self.lengths.append(len(self.ids))
        logits = self.model(torch.tensor([*self.prompt_ids, *self.ids]))
        return torch.softmax(logits[len(self.prompt_ids) :].double(), dim=-1)

    def eos_confidence(self, probs: torch.Tensor) -> float:
        """See `eos_confidence`."""
        return eos_confidence(probs, self.eos_id, self.eos_check_tokens)

    def fill(self, probs: torch.Tensor, block: range, threshold: float) -> None:
        """Commit what is above the threshold, or else the surest one."""
        masks = [i for i in block if self.ids[i] == self.mask_id]
        best = {i: int(probs[i].argmax()) for i in masks}
        sure = {i: float(probs[i, best[i]]) for i in masks if best[i] != self.mask_id}
        filled = [i for i in sure if sure[i] > threshold]
        if not filled and sure:
            filled = [max(sure, key=sure.__getitem__)]
        if not filled and masks:
            # Every mask predicts itself: the best other token, by its new share.
            others = probs[masks].clone()
            others[:, self.mask_id] = 0
            others /= others.sum(dim=-1, keepdim=True)
            at = int(others.amax(dim=-1).argmax())
            filled, best[masks[at]] = [masks[at]], int(others[at].argmax())
        for i in filled:
            self.ids[i] = best[i]

    def has_masks(self, start: int, end: int) -> bool:
        return self.mask_id in self.ids[start:end]


def eos_confidence(probs: torch.Tensor, eos_id: int, eos_check_tokens: int) -> float:
    """The sum of the last predicted EOS, at most so many, over that number.

    probs: (G, V) float64, of all positions of the answer.
    """
    is_eos = (probs.argmax(dim=-1) == eos_id).tolist()
    found = [
        float(row[eos_id]) for row, is_one in zip(probs, is_eos, strict=True) if is_one
    ]
    return sum(found[-eos_check_tokens:]) / eos_check_tokens


def rho_eos(
    model: LogitsFn,
    prompt_ids: list[int],
    max_gen_length: int,
    *,
    mask_id: int,
    eos_id: int,
    initial_gen_length: int = 64,
    block_length: int = 32,
    threshold: float = 0.9,
    expansion_factor: int = 8,
    eos_check_tokens: int = 32,
    low: float = 0.4,
    high: float = 0.6,
    scheduler: str = "exp",
    max_steps: int | None = None,
) -> Loop:
    """One forward, one commit and one change of the length at a time."""
    loop = Loop(
        model, prompt_ids, [mask_id] * initial_gen_length, mask_id, eos_id,
        eos_check_tokens,
    )  # fmt: skip
    position = 0
    while position < len(loop.ids) and loop.nfe != max_steps:
        before = list(loop.ids)
        may_adjust = len(loop.ids) < max_gen_length and loop.nfe < MAX_ADJUST_STEPS
        probs = loop.forward()
        loop.fill(probs, _block(loop, position, block_length), threshold)
        while position < len(loop.ids):
            end = min(position + block_length, len(loop.ids))
            if loop.has_masks(position, end):
                break
            position = end
        if may_adjust:
            density = torch.tensor(loop.eos_confidence(probs), dtype=torch.float32)
            step = length_step(density, expansion_factor, low, high, scheduler)
            _change(loop, step, max_gen_length)
        position = min(position, len(loop.ids))
        if loop.ids == before:
            break
    return loop


def _block(loop: Loop, position: int, block_length: int) -> range:
    return range(position, min(position + block_length, len(loop.ids)))


def length_step(
    density: torch.Tensor,
    expansion_factor: int,
    low: float,
    high: float,
    scheduler: str,
) -> int:
    """Positions that come, below `low`, or go, above `high`: less than 0.

    density: () float32, in which the published code calculates.
    """
    if density < low:
        gap, sign = low - density, 1
    elif density > high:
        gap, sign = density - high, -1
    else:
        return 0
    segment = int(torch.ceil((gap + 1e-12) / 0.1))
    multiplier = {
        "const": 1,
        "linear": max(1, segment),
        "exp": 2 ** max(0, segment - 1),
    }[scheduler]
    return sign * min(multiplier, MAX_MULTIPLIER) * expansion_factor


def _change(loop: Loop, step: int, cap: int) -> None:
    length = max(0, min(len(loop.ids) + step, cap))
    loop.ids = loop.ids[:length] + [loop.mask_id] * (length - len(loop.ids))


def daedal(
    model: LogitsFn,
    prompt_ids: list[int],
    max_gen_length: int,
    *,
    mask_id: int,
    eos_id: int,
    initial_gen_length: int = 64,
    block_length: int = 32,
    high_conf_threshold: float = 0.9,
    low_conf_threshold: float = 0.1,
    expansion_factor: int = 8,
    eos_confidence_threshold: float = 0.5,
    expand_eos_confidence_threshold: float = 0.9,
    eos_check_tokens: int = 32,
) -> Loop:
    """First the length of a canvas of masks, then decoding with insertions."""
    cap = max_gen_length
    loop = Loop(
        model, prompt_ids, [mask_id] * initial_gen_length, mask_id, eos_id,
        eos_check_tokens,
    )  # fmt: skip
    while True:
        confidence = loop.eos_confidence(loop.forward())
        length = len(loop.ids)
        if confidence >= eos_confidence_threshold or length >= cap:
            break
        loop.ids = [mask_id] * min(length + expansion_factor, cap)
    tail = max(0, min(eos_check_tokens // 2, cap - len(loop.ids)))
    loop.ids += [eos_id] * tail
    position = 0
    while position < len(loop.ids):
        before = list(loop.ids)
        probs = loop.forward()
        block = _block(loop, position, block_length)
        loop.fill(probs, block, high_conf_threshold)
        if (
            len(loop.ids) < cap
            and loop.eos_confidence(probs) < expand_eos_confidence_threshold
        ):
            left = [i for i in block if loop.ids[i] == mask_id]
            hopeless = {i: float(probs[i].max()) for i in left}
            hopeless = {i: c for i, c in hopeless.items() if c < low_conf_threshold}
            if hopeless:
                at = min(hopeless, key=hopeless.__getitem__)
                loop.ids[at : at + 1] = [mask_id] * expansion_factor
                loop.ids = loop.ids[:cap]
        while position < len(loop.ids) and not loop.has_masks(
            position, position + block_length
        ):
            position += block_length
        if loop.ids == before:
            break
    return loop
