"""Drawing tokens at a temperature above 0, reproducibly per request.

Each draw is a pure function of (seed, step, position): the same request gets the
same tokens alone, in a crowd and after a restart.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.statistics import without_token

_MASK64 = (1 << 64) - 1


def counter_uniform(
    seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Uniform numbers in [0, 1) from a counter-based generator (SplitMix64 rounds).

    Args:
        seed, step, position: ``(N,)`` int64.

    Returns:
        ``(N,)`` float64.
    """
    state = _mix(seed)
    state = _mix(state ^ _mix(step + 1))
    state = _mix(state ^ _mix(position + (1 << 32)))
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
    logits: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor
) -> torch.Tensor:
    """Drop tokens outside the nucleus, then outside the k best (Dream's order).

    A token is dropped once the probability of the better ones exceeds top_p; the
    best token always stays.

    Args:
        logits: ``(N, V)`` float64, already divided by the temperature.
        top_p: ``(N,)`` float64 in (0, 1].
        top_k: ``(N,)`` int64; 0 keeps all.

    Returns:
        ``(N, V)`` with dropped tokens at -inf.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(dim=-1)
    better = p.cumsum(dim=-1) - p
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    dropped = (better > top_p[:, None]) | (rank >= limit[:, None])
    dropped[:, 0] = False
    return logits.masked_fill(
        torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf
    )


def draw_tokens(
    logits: torch.Tensor,
    mask_id: int,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """One token a row from ``softmax(logits / temperature)`` after top-p and top-k.

    Both families sample this distribution: LLaDA by Gumbel noise, Dream by a
    categorical draw. Ours inverts the cumulative distribution with one uniform
    number a row.

    Args:
        logits: ``(N, V)`` float.
        mask_id: never drawn.
        temperature, top_p: ``(N,)`` float64, temperature above 0.
        top_k: ``(N,)`` int64; 0 keeps all.
        uniform: ``(N,)`` float64 in [0, 1).

    Returns:
        ``(N,)`` int64 token ids.
    """
    scaled = without_token(logits.double(), mask_id) / temperature[:, None]
    p = filter_logits(scaled, top_p, top_k).softmax(dim=-1)
    cumulative = p.cumsum(dim=-1)
    target = uniform * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # Rounding may put the target on the last sum; step back to a possible token.
    last = (p > 0).int().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(drawn, last)
