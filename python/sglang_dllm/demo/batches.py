"""Training batches: prompts in several dress, canvases of several lengths, masks.

Rows of a batch have one length: the EOS tail of a shorter row is simply longer. So
training needs no padding and no attention mask, like inference.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sglang_dllm.demo.problems import Problem, draw
from sglang_dllm.demo.tokenizer import EOS, MASK, chat_prompt

# Weight of the EOS tokens after the first one, which say nothing new.
TAIL_WEIGHT = 0.1


@dataclass(frozen=True)
class Batch:
    """`noisy`, `clean`: (B, L) int64; `weight`: (B, L) float, 0 where not masked."""

    noisy: Tensor
    clean: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]
    # Tokens after the response that must be EOS, at the least.
    tail: int

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response) + self.tail


class BatchSource:
    """Endless batches of about `tokens` tokens, a pure function of the seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int, tokens: int) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.eos = tokenizer.token_to_id(EOS)
        self.mask = tokenizer.token_to_id(MASK)
        self.is_digit = torch.tensor(
            [
                tokenizer.decode([i]).strip().isdigit()
                for i in range(tokenizer.get_vocab_size())
            ]
        )

    def pool(self, max_steps: int, size: int = 3072) -> Iterator[Batch]:
        """The batches of `size` fresh examples, similar lengths together."""
        examples = sorted(
            (self.example(max_steps) for _ in range(size)), key=lambda e: e.length
        )
        groups: list[list[Example]] = [[]]
        for example in examples:
            if (len(groups[-1]) + 1) * example.length > self.tokens:
                groups.append([])
            groups[-1].append(example)
        self.rng.shuffle(groups)
        for group in groups:
            yield self.collate(group)

    def example(self, max_steps: int) -> Example:
        rng = self.rng
        prompt, answer = dress(rng, draw(rng, "train", max_steps))
        response = self.tokenizer.encode(answer).ids
        kind = rng.random()
        if kind < 0.75:
            tail = rng.randint(1, 6)
        else:
            canvas = 64 if kind < 0.92 else 128 if kind < 0.98 else 256
            tail = canvas - len(response)
        return Example(self.tokenizer.encode(prompt).ids, response, tail)

    def collate(self, group: list[Example]) -> Batch:
        length = max(e.length for e in group)
        rows = [e.prompt + e.response for e in group]
        clean = torch.tensor([r + [self.eos] * (length - len(r)) for r in rows])
        start = torch.tensor([[len(e.prompt)] for e in group])
        end = torch.tensor([[len(r)] for r in rows])
        place = torch.arange(length)[None]
        masked, share = self.noise(clean, start, end)
        value = torch.where(place > end, TAIL_WEIGHT, 1.0) * (place >= start)
        # Cross-entropy / t / response length, LLaDA's objective (arXiv:2502.09992).
        weight = value / (share * value.sum(1, keepdim=True) * len(group))
        noisy = torch.where(masked, self.mask, clean)
        return Batch(noisy, clean, torch.where(masked, weight, 0.0))

    def noise(self, clean: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Which response tokens are masked, `(B, L)` bool, and their share `(B, 1)`.

        Half of the rows: each token with probability t, stratified over the batch.
        The others look like the states a decoder meets: known up to some place, the
        digits after it unknown, of the other tokens after it a random share known.
        """
        rows, length = clean.shape
        place = torch.arange(length)[None]

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=self.generator)

        order = torch.randperm(rows, generator=self.generator)[:, None]
        t = ((order + uniform(rows, 1)) / rows).clamp(min=0.05)
        scattered = uniform(rows, length) < t
        cut = start + uniform(rows, 1) * (end - start)
        known = ~self.is_digit[clean] & (uniform(rows, length) < uniform(rows, 1))
        ordered = (place >= cut) & ~known
        use_scattered = uniform(rows, 1) < 0.5
        response = place >= start
        masked = torch.where(use_scattered, scattered, ordered) & response
        share = (masked & (place <= end)).sum(1, keepdim=True) / (end - start + 1)
        share = torch.where(use_scattered, t, share.clamp(min=0.05))
        return masked, share


def dress(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """Prompt and response text: chat, a second chat turn, or plain completion."""
    kind = rng.random()
    if kind < 0.80:
        return chat_prompt([("user", problem.question)]), problem.answer
    if kind < 0.85:
        earlier = draw(rng, "train")
        turns = [
            ("user", earlier.question),
            ("assistant", earlier.answer),
            ("user", problem.question),
        ]
        return chat_prompt(turns), problem.answer
    q, a = ("Q", "A") if rng.random() < 0.6 else ("Question", "Answer")
    return f"{q}: {problem.question}\n{a}:", f" {problem.answer}"
