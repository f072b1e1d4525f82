"""Drawing tokens at a temperature above 0, reproducibly per request.

Each draw is a pure function of (seed, step, position): the same request gets the
same tokens alone, in a crowd and after a restart.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from sglang_dllm.decoding.statistics import without_token


class Stream(IntEnum):
    """The purpose of a random number."""

    TOKEN = 1
    ORDER = 2
    MASK = 3
    COUNT = 4
    # The last one: its positions count tokens too, and reach beyond 32 bits.
    STRUCTURE = 5


def counter_uniform(
    seed: torch.Tensor,
    step: torch.Tensor,
    position: torch.Tensor,
    stream: Stream = Stream.TOKEN,
) -> torch.Tensor:
    """Uniform numbers in [0, 1) from a counter-based generator (SplitMix64 rounds).

    Args:
        seed, step, position: ``(N,)`` int64, or shapes that broadcast.
        stream: what the numbers are for; streams are independent.

    Returns:
        float64 of their shape.
    """
    state = _mix(seed)
    state = _mix(state ^ _mix(step + 1))
    state = _mix(state ^ _mix(position + (stream << 32)))
    return _shift_right(state, 11).double() * 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function (Steele et al. 2014); wraps around in int64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def filter_logits(
    logits: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Drop tokens outside the nucleus, outside the k best, or far below the best.

    A token is dropped once the probability of the better ones exceeds top_p, or if its
    own is below min_p times the best one's. The best token always stays. All three read
    the same distribution, so that their order does not matter.

    Args:
        logits: ``(N, V)`` float64, already divided by the temperature.
        top_p: ``(N,)`` float64 in (0, 1].
        top_k: ``(N,)`` int64; 0 keeps all.
        min_p: ``(N,)`` float64 in [0, 1].

    Returns:
        ``(N, V)`` with dropped tokens at -inf.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(dim=-1)
    # Shifted, not subtracted: a sum that is exactly top_p must stay it.
    better = torch.nn.functional.pad(p.cumsum(dim=-1)[:, :-1], (1, 0))
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    outside = (better > top_p[:, None]) & (top_p[:, None] < 1)
    dropped = outside | (rank >= limit[:, None]) | (p < min_p[:, None] * p[:, :1])
    dropped[:, 0] = False
    return logits.masked_fill(
        torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf
    )


def distribution(
    logits: torch.Tensor,
    mask_id: int,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """``softmax(logits / temperature)`` without the mask token, after the cuts.

    Both families sample from it: LLaDA by Gumbel noise, Dream by a categorical draw.

    Args:
        logits: ``(N, V)`` float.
        temperature, top_p, min_p: ``(N,)`` float64, temperature above 0.
        top_k: ``(N,)`` int64; 0 keeps all.

    Returns:
        ``(N, V)`` float64.
    """
    scaled = without_token(logits.double(), mask_id) / temperature[:, None]
    return filter_logits(scaled, top_p, top_k, min_p).softmax(dim=-1)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row, by inverting the cumulative distribution.

    Args:
        p: ``(N, V)`` float64.
        uniform: ``(N,)`` float64 in [0, 1).

    Returns:
        ``(N,)`` int64 token ids.
    """
    cumulative = p.cumsum(dim=-1)
    target = uniform * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # Rounding may put the target on the last sum; step back to a possible token.
    last = (p > 0).int().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(drawn, last)
