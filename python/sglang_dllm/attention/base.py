"""What the backends that plan a forward ahead of its layers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window

Tokens: TypeAlias = torch.Tensor | slice
"""Some of the T packed tokens: a slice where they are neighbours."""

Kept: TypeAlias = tuple[Tokens, torch.Tensor] | None
"""The tokens that keep keys and values, and their slots ``(K,)`` int64."""

Write: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes k and v ``(K, H_kv, D)`` into a layer's pool at slots ``(K,)``."""


def same_rows(a: Sequence[Window], b: Sequence[Window]) -> bool:
    """Whether two forwards compute the same windows of the same canvases.

    Slots are compared as objects, which needs no answer from the device: a canvas's
    are made at its admission and never written to.
    """
    return len(a) == len(b) and all(
        (x.start, x.end, x.canvas_len) == (y.start, y.end, y.canvas_len)
        and x.kv_slots is y.kv_slots
        for x, y in zip(a, b, strict=True)
    )


def indptr(lens: Sequence[int]) -> torch.Tensor:
    """``(R + 1,)`` int32 on the CPU: where each of R rows begins, and the end."""
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)


def tokens_of(
    lens: Sequence[int], is_wanted: Sequence[bool], device: torch.device
) -> Tokens:
    """The tokens of the wanted rows, of which there is at least one."""
    bounds = [0, *accumulate(lens)]
    wanted = [row for row, flag in enumerate(is_wanted) if flag]
    if wanted[-1] - wanted[0] + 1 == len(wanted):
        return slice(bounds[wanted[0]], bounds[wanted[-1] + 1])
    index = torch.cat([torch.arange(bounds[r], bounds[r + 1]) for r in wanted])
    return index.to(device, non_blocking=True)


def slots_of(rows: Sequence[Window]) -> list[torch.Tensor]:
    """Where the pool keeps each row's whole canvas."""
    slots = [row.kv_slots for row in rows if row.kv_slots is not None]
    if len(slots) != len(rows):
        raise ValueError("a window needs the rest of its canvas's keys and values")
    return slots


def graph_bucket(plan: AttentionPlan) -> tuple[int, int]:
    """Rows and window length of a forward that a CUDA graph can run.

    Raises:
        ValueError: the windows differ in length or not every row keeps its KV.
    """
    lengths = set(plan.lens)
    if len(lengths) != 1:
        raise ValueError(f"a graph needs windows of one length, not {sorted(lengths)}")
    slots_of(plan.windows)
    return len(plan.windows), lengths.pop()


def put(k_pool: torch.Tensor, v_pool: torch.Tensor) -> Write:
    """Writes by index into plain pools ``(S, H_kv, D)``, in their own dtype."""

    def write(slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        k_pool[slots] = k.to(k_pool.dtype)
        v_pool[slots] = v.to(v_pool.dtype)

    return write


def into_pool(pool: Any, layer: Any) -> Write:
    """Writes through SGLang's pool, which knows its dtype, layout and scales."""
    return partial(_set_kv_buffer, pool, layer)


def _set_kv_buffer(
    pool: Any, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    if layer.k_scale is not None:
        k, v = k.clone(), v.clone()  # the pool divides them by their scale in place
    pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)
