"""Training batches: prompts in several forms, canvases of several lengths, masks.

All rows of a batch have one length, since a shorter row gets a longer EOS tail. So
training needs no padding and no attention mask, as inference does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sglang_dllm.demo.problems import TEMPLATES, Problem, draw, handover
from sglang_dllm.demo.tokenizer import EOS, MASK, chat_prompt

# Weight of the EOS tokens after the first one. They teach nothing new.
TAIL_WEIGHT = 0.1
# A further share of handovers. The model learns last which person is asked about.
EXTRA_HANDOVER = 0.25
ORDERED_SHARE, WHOLE_SHARE, FAR_WEIGHT = 0.4, 0.2, 0.15


@dataclass(frozen=True)
class Batch:
    """`noisy`, `clean`: (B, L) int64; `weight`: (B, L) float, 0 where not masked."""

    noisy: Tensor
    clean: Tensor
    weight: Tensor
    is_sheet: bool = False


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]
    tail: int
    """The least number of EOS tokens behind the response."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response) + self.tail


class BatchSource:
    """Endless batches of about `tokens` tokens. The seed alone decides them."""

    def __init__(self, tokenizer: Tokenizer, seed: int, tokens: int) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.eos = tokenizer.token_to_id(EOS)
        self.mask = tokenizer.token_to_id(MASK)
        self.equals = tokenizer.encode(" =").ids[0]
        self.final = tokenizer.encode("####").ids[0]
        self.is_digit = torch.tensor(
            [
                tokenizer.decode([i]).strip().isdigit()
                for i in range(tokenizer.get_vocab_size())
            ]
        )

    def pool(
        self, max_steps: int, sheet_share: float, size: int = 1024
    ) -> Iterator[Batch]:
        """The batches of `size` fresh examples, similar lengths together.

        A further `sheet_share` of all batches are sheets of bare equations.
        """
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
            while self.rng.random() < sheet_share:
                yield self.sheets()
            yield self.collate(group)

    def example(self, max_steps: int) -> Example:
        rng = self.rng
        most = max_steps if rng.random() < 0.93 else 3
        templates = (handover,) if rng.random() < EXTRA_HANDOVER else TEMPLATES
        prompt, answer = dress(rng, draw(rng, "train", most, templates))
        response = self.tokenizer.encode(answer).ids
        kind = rng.random()
        if kind < 0.94:
            tail = rng.randint(1, 5)
        else:
            canvas = 64 if kind < 0.98 else 128 if kind < 0.995 else 256
            tail = canvas - len(response)
        return Example(self.tokenizer.encode(prompt).ids, response, tail)

    def collate(self, group: list[Example]) -> Batch:
        length = max(e.length for e in group)
        rows = [e.prompt + e.response for e in group]
        clean = torch.tensor([r + [self.eos] * (length - len(r)) for r in rows])
        start = torch.tensor([[len(e.prompt)] for e in group])
        end = torch.tensor([[len(r)] for r in rows])
        weight = self.noise(clean, start, end) / len(group)
        noisy = torch.where(weight > 0, self.mask, clean)
        return Batch(noisy, clean, weight)

    def sheets(self, lines: int = 7) -> Batch:
        """Rows of unrelated equations in the form of a response's lines.

        A row of a word problem teaches a handful of digits of arithmetic. In a sheet
        every line hides all or a part of its result, and all of it can be worked out.
        """
        rows, length = self.tokens // (lines * 9), lines * 9
        texts = ["\n".join(self.equation() for _ in range(lines)) for _ in range(rows)]
        encodings = self.tokenizer.encode_batch(texts)
        clean = torch.tensor(
            [(e.ids + [self.eos] * length)[:length] for e in encodings]
        )
        result = self.results(clean)
        masked = result & (self.uniform(rows, length) < 0.85)
        masked |= ~self.is_digit[clean] & (self.uniform(rows, length) < 0.05)
        weight = masked / masked.sum().clamp(min=1)
        return Batch(
            torch.where(masked, self.mask, clean), clean, weight, is_sheet=True
        )

    def equation(self) -> str:
        problem = draw(self.rng, "train")
        return self.rng.choice(problem.answer.split("\n")[:-1])

    def noise(self, clean: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Weight of each masked token, `(B, L)` float, 0 for the others."""
        place = torch.arange(clean.shape[1])[None]
        value = torch.where(place > end, TAIL_WEIGHT, 1.0) * (place >= start)
        kind = self.uniform(len(clean), 1)
        answers = torch.where(
            kind < ORDERED_SHARE,
            self.ordered_noise(clean, start, end, value),
            self.scattered_noise(value),
        )
        return torch.where(
            kind > 1 - WHOLE_SHARE, self.whole_noise(end, place), answers
        )

    def whole_noise(self, end: Tensor, place: Tensor) -> Tensor:
        """LLaDA's pretraining objective: question and answer masked alike.

        A hidden number can often still be read on the other side. The model learns
        soonest in this way to copy between question and answer.
        """
        text = (place <= end) & (place > 0)
        t = 0.1 + 0.6 * self.uniform(len(end), 1)
        masked = text & (self.uniform(len(end), place.shape[1]) < t)
        return masked / masked.sum(1, keepdim=True).clamp(min=1)

    def scattered_noise(self, value: Tensor) -> Tensor:
        """LLaDA's SFT objective (arXiv:2502.09992): each token with probability t.

        t is stratified over the batch. Weights are 1 / t / response length.
        """
        rows = len(value)
        order = torch.randperm(rows, generator=self.generator)[:, None]
        t = ((order + self.uniform(rows, 1)) / rows).clamp(min=0.05)
        masked = self.uniform(*value.shape) < t
        return value * masked / (t * value.sum(1, keepdim=True))

    def ordered_noise(
        self, clean: Tensor, start: Tensor, end: Tensor, value: Tensor
    ) -> Tensor:
        """The states of a decoding loop: all known up to a cut, no digit behind it.

        A random share of the other tokens behind the cut is known. Scattered masks
        seldom hide a result everywhere, because it returns in the next line. So a third
        of the cuts are right before a result, and another third are at the very start.
        Results behind the first two numbers depend on unknown numbers. They weigh less,
        or their noise would drown the rest.
        """
        rows, length = clean.shape
        place = torch.arange(length)[None]
        equals = (clean == self.equals) & (place >= start)
        at_result = (self.uniform(rows, length) * equals).argmax(1, keepdim=True) + 1
        anywhere = start + self.uniform(rows, 1) * (end - start)
        kind = self.uniform(rows, 1)
        cut = torch.where(kind < 0.33, at_result, anywhere)
        cut = torch.where(kind > 0.67, start, cut)
        digit = self.is_digit[clean]
        after = place >= cut
        known = ~digit & (self.uniform(rows, length) < self.uniform(rows, 1))
        begins = digit & ~digit.roll(1, dims=1) & after
        far = self.results(clean) & (begins.cumsum(1) > 2)
        near = torch.where(digit, 1.0, 0.3) * value
        weight = torch.where(far, FAR_WEIGHT, near) * (after & ~known)
        return weight / weight.sum(1, keepdim=True).clamp(min=1.0)

    def results(self, clean: Tensor) -> Tensor:
        """Digits whose last token before them that is no digit is `=` or `####`."""
        digit = self.is_digit[clean]
        place = torch.arange(clean.shape[1]).expand_as(clean)
        sign = clean.gather(1, torch.where(digit, 0, place).cummax(1).values)
        return digit & ((sign == self.equals) | (sign == self.final))

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator)


def dress(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """Prompt and response text: chat, a second chat turn, or plain completion."""
    kind = rng.random()
    if kind < 0.92:
        return chat_prompt([("user", problem.question)]), problem.answer
    if kind < 0.94:
        earlier = draw(rng, "train")
        turns = [
            ("user", earlier.question),
            ("assistant", earlier.answer),
            ("user", problem.question),
        ]
        return chat_prompt(turns), problem.answer
    q, a = ("Q", "A") if rng.random() < 0.6 else ("Question", "Answer")
    return f"{q}: {problem.question}\n{a}:", f" {problem.answer}"
