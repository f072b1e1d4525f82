"""Batches of windows for attention backends, and the oracle's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sglang_dllm.attention.base import CanvasAttention, LayerPool
from sglang_dllm.attention.plan import AttentionPlan, KVWrites
from sglang_dllm.attention.sdpa import SDPACanvasAttention, attend
from sglang_dllm.decoding.window import Window

WindowShape = tuple[int, int, int, bool]
"""Start, end, length of the canvas, and whether the canvas has KV slots."""

WINDOWS: dict[str, list[WindowShape]] = {
    "one full": [(0, 9, 9, False)],
    "full": [(0, 9, 9, False), (0, 5, 5, False), (0, 1, 1, False), (0, 7, 7, False)],
    "full, kept": [(0, 9, 9, True), (0, 20, 20, True)],
    "full, some kept": [(0, 9, 9, True), (0, 6, 6, False), (0, 6, 6, False)],
    "one window": [(3, 7, 9, True)],
    "windows": [
        (3, 7, 9, True),
        (0, 4, 21, True),
        (20, 21, 21, True),
        (0, 2, 70, True),
    ],
    "full, then windows": [(0, 6, 6, False), (0, 4, 4, True), (2, 6, 9, True)],
    "windows, then full": [(3, 7, 9, True), (8, 9, 9, True), (0, 6, 6, False)],
    "interleaved": [
        *((0, 9, 9, True), (3, 7, 9, True), (0, 6, 6, False), (2, 6, 40, True)),
        *((8, 9, 9, True), (0, 4, 4, True)),
    ],
    "as long as 140": [(0, 140, 140, False), (30, 62, 140, True), (0, 140, 140, True)],
}


@dataclass(frozen=True)
class Batch:
    """The arguments of one layer's attention, and the plan."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    plan: AttentionPlan
    scale: float

    @property
    def pools(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_pool, self.v_pool

    @property
    def layer_pool(self) -> LayerPool:
        return LayerPool(self.k_pool, self.v_pool)

    def copy(self) -> Batch:
        """With pools of its own."""
        return replace(self, k_pool=self.k_pool.clone(), v_pool=self.v_pool.clone())

    def to(self, device: str) -> Batch:
        windows = [
            replace(w, kv_slots=None if w.kv_slots is None else w.kv_slots.to(device))
            for w in self.plan.windows
        ]
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("q", "k", "v", "k_pool", "v_pool")
        }
        return replace(
            self, plan=AttentionPlan(windows, self.plan.logits_indices), **tensors
        )


def plan_of(windows: Sequence[WindowShape], seed: int = 0) -> AttentionPlan:
    """The canvases are spread over a pool of ``pool_size`` slots, without slot 0."""
    generator = torch.Generator().manual_seed(seed)
    slots = 1 + torch.randperm(pool_size(windows) - 1, generator=generator)
    found, first = [], 0
    for start, end, canvas_len, has_slots in windows:
        own = slots[first : first + canvas_len] if has_slots else None
        found.append(Window(start, end, canvas_len, own))
        first += canvas_len
    return AttentionPlan(found, torch.tensor([0]))


def pool_size(windows: Sequence[WindowShape]) -> int:
    return sum(canvas_len for _, _, canvas_len, _ in windows) + 5


def random_batch(
    plan: AttentionPlan,
    size: int,
    heads: tuple[int, int],
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Batch:
    """q, k, v are strided views of one projection, as in the model."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    width = num_heads + 2 * num_kv_heads
    qkv = torch.randn(sum(plan.lens), width, head_dim, generator=generator).to(dtype)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    pools = torch.randn(2, size, num_kv_heads, head_dim, generator=generator)
    k_pool, v_pool = pools.to(pool_dtype or dtype)
    # Not D ** -0.5, which would hide a scale that is not passed on.
    return Batch(q, k, v, k_pool, v_pool, plan, 0.3)


MAX_LEN = 160
"""The longest canvas of a bucket."""

_BUCKETS: WeakKeyDictionary[CanvasAttention[Any], dict[tuple[int, int], Any]] = (
    WeakKeyDictionary()
)


def buckets_of(attention: CanvasAttention[Any]) -> dict[tuple[int, int], Any]:
    """The buckets of ``plan_bucket``, by their windows and the tokens of one."""
    return _BUCKETS.setdefault(attention, {})


def plan_bucket(attention: CanvasAttention[Any], plan: AttentionPlan) -> None:
    """Let ``run`` read the bucket of a plan, as the forward of a CUDA graph does."""
    writes = plan.kv_writes
    assert writes is not None
    (length,) = set(plan.lens)
    size = len(plan.windows), length
    found = buckets_of(attention)
    if size not in found:
        own = KVWrites(slice(None), torch.zeros_like(writes.slots))
        found[size] = attention.new_bucket(*size, MAX_LEN, own)
    found[size].kv_writes.slots.copy_(writes.slots)
    attention.fill_bucket(found[size], plan)
    attention.use(found[size])


def sdpa(batch: Batch) -> torch.Tensor:
    """The oracle; ``test_sdpa.py`` compares it with a softmax token by token. Writes to
    the batch's pools."""
    attention = SDPACanvasAttention("cpu")
    attention.plan(batch.plan)
    return attention.run(batch.q, batch.k, batch.v, batch.layer_pool, batch.scale)


def expected(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention in fp32 ``(T, H, D)``, and the pools after it in their own dtype."""
    own = batch.copy()
    sdpa(own)
    q, k, v = (x.float() for x in (batch.q, batch.k, batch.v))
    k_pool, v_pool = (pool.float() for pool in own.pools)
    # Full windows read their fresh keys; the others those that the pool's dtype holds.
    windows = [
        replace(window, kv_slots=None) if window.is_full else window
        for window in own.plan.windows
    ]
    plan = AttentionPlan(windows, own.plan.logits_indices)
    if plan.kv_writes is not None:
        tokens, slots = plan.kv_writes
        k, v = k.clone(), v.clone()
        k[tokens], v[tokens] = k_pool[slots], v_pool[slots]
    out = sdpa(Batch(q, k, v, k_pool, v_pool, plan, own.scale))
    return out, *own.pools


def assert_right(attention: CanvasAttention[Any], batch: Batch) -> None:
    """Run one layer of a planned forward, and compare it with the oracle."""
    wanted, *pools = expected(batch.to("cpu"))
    own = batch.copy()
    out = attention.run(own.q, own.k, own.v, own.layer_pool, own.scale)
    assert out.dtype == batch.q.dtype
    torch.testing.assert_close(out.float().cpu(), wanted, atol=1e-2, rtol=1e-2)
    for pool, wanted_pool in zip(own.pools, pools, strict=True):
        assert torch.equal(pool.float().cpu(), wanted_pool.float())


def moved(plan: AttentionPlan) -> AttentionPlan:
    """All windows but the full ones one token earlier."""
    windows = [
        w if w.is_full else replace(w, start=w.start - 1, end=w.end - 1)
        for w in plan.windows
    ]
    return AttentionPlan(windows, plan.logits_indices)


def graph_windows(*canvas_lens: int, length: int = 4) -> list[WindowShape]:
    """Windows of one length, as a graph needs them."""
    starts = [min(n // 3, n - length) for n in canvas_lens]
    return [(i, i + length, n, True) for i, n in zip(starts, canvas_lens, strict=True)]


def plain_canvas_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    max_len: int,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """``kernels.canvas_attention.triton_canvas_attention``, window by window in
    torch."""
    out = torch.empty(q.shape)
    assert table.dtype == slots.dtype == torch.int32
    assert max(table[:, 1]) == max_len
    for first, num_tokens, canvas_len, first_slot in table.tolist():
        at = slice(first, first + num_tokens)
        keys, values, keys_scale, values_scale = k[at], v[at], 1.0, 1.0
        if first_slot >= 0:
            own = slots[first_slot : first_slot + canvas_len].long()
            keys, values = k_pool[own], v_pool[own]
            keys_scale, values_scale = k_scale, v_scale
        assert len(keys) == canvas_len
        found = q[at].float(), keys.float(), values_scale * values.float()
        out[at] = attend(*found, 1, scale * keys_scale)
    return out.to(q.dtype)
