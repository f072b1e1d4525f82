"""Likelihoods of a given continuation, written from the published rules.

- `mc` is LLaDA's `get_log_likelihood` (`forward_process`, `get_logits`).
- `chain` is the `ar_ftb` of Dream's evaluation: one row for each token, with the
  tokens before it given and all others masked.
- `confidence` is iLLaDA's scoring (arXiv 2606.25331).
- `is_greedy` is LLaDA's `suffix_greedy_prediction`.

A model takes ids (L,) int64 and gives *usable* logits (L, V): row i predicts position
i. Random numbers come from the caller: `uniform(stream, step, position)` in [0, 1) with
the streams "count" (the first number of masks of a group of samples) and "mask".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from reference.memory import LogitsFn

Uniform = Callable[[str, int, int], float]


def guided_logits(
    model: LogitsFn, ids: torch.Tensor, num_prompt: int, mask_id: int, cfg_scale: float
) -> torch.Tensor:
    logits = model(ids).double()
    if cfg_scale > 0:
        blind = ids.clone()
        blind[:num_prompt] = mask_id
        without = model(blind).double()
        logits = without + (cfg_scale + 1) * (logits - without)
    return logits


def mask_patterns(
    length: int, num_samples: int, batch_size: int, uniform: Uniform
) -> Iterator[list[bool]]:
    """The masks of the samples: their numbers are spread evenly in each batch."""
    sample = 0
    for batch, first in enumerate(range(0, num_samples, batch_size)):
        b = min(batch_size, num_samples - first)
        k = int(uniform("count", batch, 0) * length) + 1
        x = torch.linspace(float(k), k + (b - 1) * (length / b), steps=b)
        for num in ((torch.round(x).long() - 1) % length + 1).tolist():
            numbers = [uniform("mask", sample, i) for i in range(length)]
            order = sorted(range(length), key=lambda i: numbers[i])
            yield [i in order[:num] for i in range(length)]
            sample += 1


def mc(
    model: LogitsFn,
    prompt: list[int],
    target: list[int],
    mask_id: int,
    *,
    num_samples: int,
    batch_size: int,
    uniform: Uniform,
    cfg_scale: float = 0.0,
) -> float:
    losses = []
    for masked in mask_patterns(len(target), num_samples, batch_size, uniform):
        is_mask = torch.tensor([False] * len(prompt) + masked)
        seq = torch.tensor(prompt + target)
        noisy = torch.where(is_mask, mask_id, seq)
        logits = guided_logits(model, noisy, len(prompt), mask_id, cfg_scale)
        p_mask = sum(masked) / len(target)
        loss = F.cross_entropy(logits[is_mask], seq[is_mask], reduction="none")
        losses.append(float(loss.sum()) / p_mask)
    return -sum(losses) / len(losses)


def chain(
    model: LogitsFn,
    prompt: list[int],
    target: list[int],
    mask_id: int,
    cfg_scale: float = 0.0,
) -> list[float]:
    found = []
    for i, token in enumerate(target):
        ids = prompt + target[:i] + [mask_id] * (len(target) - i)
        at = len(prompt) + i
        logits = guided_logits(
            model, torch.tensor(ids), len(prompt), mask_id, cfg_scale
        )
        found.append(float(logits[at].log_softmax(-1)[token]))
    return found


def confidence(
    model: LogitsFn,
    prompt: list[int],
    target: list[int],
    mask_id: int,
    cfg_scale: float = 0.0,
) -> list[float]:
    left, found = set(range(len(target))), [0.0] * len(target)
    while left:
        ids = prompt + [mask_id if i in left else t for i, t in enumerate(target)]
        logits = guided_logits(
            model, torch.tensor(ids), len(prompt), mask_id, cfg_scale
        )
        p = logits[len(prompt) :].softmax(-1)
        surest = max(sorted(left), key=lambda i: float(p[i].max()))
        found[surest] = float(p[surest, target[surest]].log())
        left.remove(surest)
    return found


def is_greedy(
    model: LogitsFn,
    prompt: list[int],
    target: list[int],
    mask_id: int,
    cfg_scale: float = 0.0,
) -> bool:
    seq = prompt + [mask_id] * len(target)
    for _ in target:
        masked = [i for i, token in enumerate(seq) if token == mask_id]
        masked = [i for i in masked if i >= len(prompt)]
        if not masked:
            break
        logits = guided_logits(
            model, torch.tensor(seq), len(prompt), mask_id, cfg_scale
        )
        p = logits.softmax(-1)
        surest = max(masked, key=lambda i: float(p[i].max()))
        seq[surest] = int(logits[surest].argmax())
    return seq[len(prompt) :] == target
