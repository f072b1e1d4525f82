"""Ragged full attention equals a softmax written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.attention_batches import Batch, sdpa
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], scale: float
) -> torch.Tensor:
    """q: (T, H, D), k and v: (T, H_kv, D or D_v) -> (T, H, D_v)."""
    heads_per_kv = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2])
    start = 0
    for length in lens:
        canvas = range(start, start + length)
        for head in range(q.shape[1]):
            kv = head // heads_per_kv
            for i in canvas:
                scores = [scale * float(q[i, head] @ k[j, kv]) for j in canvas]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for j, weight in zip(canvas, weights, strict=True):
                    out[i, head] += weight / sum(weights) * v[j, kv]
        start += length
    return out


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], scale: float
) -> torch.Tensor:
    """Whole canvases; nothing is read from the pool."""
    nothing = torch.empty(0)
    windows = [Window(0, length, length) for length in lens]
    plan = AttentionPlan(windows, torch.tensor([0]))
    return sdpa(Batch(q, k, v, nothing, nothing, plan, scale))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    "lens", [[7], [1], [5, 5, 5], [1, 1], [3, 9, 1, 6], [2, 2, 3]], ids=str
)
def test_equals_naive_softmax(heads: tuple[int, int], lens: list[int]) -> None:
    torch.manual_seed(sum(lens))
    num_heads, num_kv_heads = heads
    q = torch.randn(sum(lens), num_heads, 8)
    k = torch.randn(sum(lens), num_kv_heads, 8)
    v = torch.randn(sum(lens), num_kv_heads, 8)
    # Not D ** -0.5, which would hide a scale that is not passed on.
    out = full_attention(q, k, v, lens, 0.7)
    torch.testing.assert_close(out, naive(q, k, v, lens, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lens", [[6, 6], [4, 8]], ids=str)
def test_canvases_do_not_see_each_other(lens: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 2, 4) for _ in range(3))
    before = full_attention(q, k, v, lens, 0.5)
    k[lens[0] :], v[lens[0] :] = 9.0, -9.0
    after = full_attention(q, k, v, lens, 0.5)
    assert torch.equal(before[: lens[0]], after[: lens[0]])
    assert not torch.allclose(before[lens[0] :], after[lens[0] :])


@pytest.mark.parametrize("lens", [[6, 6], [4, 8]], ids=str)
def test_values_may_be_wider_than_keys(lens: list[int]) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(12, 4, 4), torch.randn(12, 2, 4), torch.randn(12, 2, 6)
    out = full_attention(q, k, v, lens, 0.5)
    assert out.shape == (12, 4, 6)
    torch.testing.assert_close(out, naive(q, k, v, lens, 0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lens", [[6, 6], [4, 8]], ids=str)
def test_reads_strided_slices_of_a_fused_projection(lens: list[int]) -> None:
    """q, k, v are views of one projection in the model, not contiguous tensors."""
    torch.manual_seed(2)
    qkv = torch.randn(12, 32)
    q, k, v = qkv.split([16, 8, 8], dim=-1)
    views = q.unflatten(1, (4, 4)), k.unflatten(1, (2, 4)), v.unflatten(1, (2, 4))
    out = full_attention(*views, lens, 0.5)
    torch.testing.assert_close(out, naive(*views, lens, 0.5), atol=1e-5, rtol=1e-5)


WINDOWS = [(0, 9, 9), (3, 7, 9), (0, 6, 6), (2, 6, 9), (8, 9, 9), (0, 4, 8)]
"""Start and end of a window, and its canvas's length."""


@pytest.mark.parametrize("all_have_slots", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
def test_windows_attend_to_whole_canvases_in_the_pool(
    heads: tuple[int, int], all_have_slots: bool
) -> None:
    """Full windows, shorter ones and canvases without KV slots, in one batch."""
    torch.manual_seed(3)
    num_heads, num_kv_heads = heads
    k_pool, v_pool = torch.randn(2, 80, num_kv_heads, 8)
    slots = torch.randperm(80)
    windows, first = [], 0
    for start, end, canvas_len in WINDOWS:
        has_slots = all_have_slots or end - start < canvas_len
        own = slots[first : first + canvas_len] if has_slots else None
        windows.append(Window(start, end, canvas_len, own))
        first += canvas_len
    plan = AttentionPlan(windows, torch.tensor([0]))
    total = sum(plan.lens)
    q = torch.randn(total, num_heads, 8)
    k, v = torch.randn(2, total, num_kv_heads, 8)
    before = k_pool.clone(), v_pool.clone()
    out = sdpa(Batch(q, k, v, k_pool, v_pool, plan, 0.7))
    used, first = set(), 0
    for window in windows:
        fresh = slice(first, first + window.num_tokens)
        first = fresh.stop
        canvas = torch.empty(2, window.canvas_len, num_kv_heads, 8)
        if window.kv_slots is not None:
            canvas[0], canvas[1] = (pool[window.kv_slots] for pool in before)
            used |= set(window.kv_slots[window.start : window.end].tolist())
            # The next forward finds the fresh ones, and all others as they were.
            assert torch.equal(
                k_pool[window.kv_slots[window.start : window.end]], k[fresh]
            )
            assert torch.equal(
                v_pool[window.kv_slots[window.start : window.end]], v[fresh]
            )
        canvas[0, window.start : window.end] = k[fresh]
        canvas[1, window.start : window.end] = v[fresh]
        queries = torch.zeros(window.canvas_len, num_heads, 8)
        queries[window.start : window.end] = q[fresh]
        wanted = naive(queries, canvas[0], canvas[1], [window.canvas_len], 0.7)
        torch.testing.assert_close(
            out[fresh], wanted[window.start : window.end], atol=1e-5, rtol=1e-5
        )
    untouched = [slot for slot in range(80) if slot not in used]
    assert torch.equal(k_pool[untouched], before[0][untouched])
    assert torch.equal(v_pool[untouched], before[1][untouched])
