"""Batches of canvases' windows for attention backends, and the oracle's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.sdpa import attend, canvas_attention
from sglang_dllm.decoding.window import Window

WindowShape = tuple[int, int, int, bool]
"""Start, end, length of the canvas, and whether it keeps keys and values."""

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
    """Arguments of ``canvas_attention``."""

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

    def copy(self) -> Batch:
        """With pools of its own."""
        return replace(self, k_pool=self.k_pool.clone(), v_pool=self.v_pool.clone())

    def to(self, device: str) -> Batch:
        rows = [
            replace(
                row, kv_slots=None if row.kv_slots is None else row.kv_slots.to(device)
            )
            for row in self.plan.windows
        ]
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("q", "k", "v", "k_pool", "v_pool")
        }
        return replace(
            self, plan=AttentionPlan(rows, self.plan.logits_indices), **tensors
        )


def plan_of(windows: Sequence[WindowShape], seed: int = 0) -> AttentionPlan:
    """The canvases are spread over a pool of ``pool_size`` slots."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(pool_size(windows), generator=generator)
    rows, first = [], 0
    for start, end, canvas_len, keeps in windows:
        own = slots[first : first + canvas_len] if keeps else None
        rows.append(Window(start, end, canvas_len, own))
        first += canvas_len
    return AttentionPlan(rows, torch.tensor([0]))


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


def expected(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention in fp32 ``(T, H, D)``, and the pools after it in their own dtype."""
    own = batch.copy()
    canvas_attention(own.q, own.k, own.v, own.plan, *own.pools, own.scale)
    q, k, v = (x.float() for x in (batch.q, batch.k, batch.v))
    k_pool, v_pool = (pool.float() for pool in own.pools)
    # The written ones as the pool's dtype holds them; full rows read theirs fresh.
    rows = [
        row if not row.is_full else replace(row, kv_slots=None)
        for row in own.plan.windows
    ]
    plan = AttentionPlan(rows, own.plan.logits_indices)
    if plan.kept is not None:
        tokens, slots = plan.kept
        k, v = k.clone(), v.clone()
        k[tokens], v[tokens] = k_pool[slots], v_pool[slots]
    out = canvas_attention(q, k, v, plan, k_pool, v_pool, own.scale)
    return out, *own.pools


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
    """``triton_kernel.triton_canvas_attention``, row by row in torch."""
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
        rows = q[at].float(), keys.float(), values_scale * values.float()
        out[at] = attend(*rows, 1, scale * keys_scale)
    return out.to(q.dtype)
