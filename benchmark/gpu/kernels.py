"""Single parts of a forward by CUDA events: attention, the head, row statistics.

Attention is timed in two forms: as SGLang's FlashInfer backend calls it (paged fa2 with
pages of one token, ragged for whole canvases), and torch's own. Keys and values are
bf16 noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmark.gpu.machine import timed
from benchmark.gpu.roofline import (
    LOGIT_BYTES,
    Floor,
    ModelShape,
    Rates,
    Work,
    attention_floor,
    floor_of,
    head_floor,
)
from benchmark.gpu.shapes import Sizes

HEAD_ROWS = (32, 64, 512)

_WORKSPACE_BYTES = 512 * 2**20

Call = Callable[[], object]
Part = tuple[str, Floor, Callable[[], Call]]
"""Name, floor, and a function that returns the call to time."""


def parts(shape: ModelShape, sizes: Sizes, rates: Rates) -> Iterator[Part]:
    """All parts. The attention is one layer's, for each case."""
    for case in sizes:
        work = Work(case.window, case.context, 0, case.batch)
        floor = attention_floor(shape, work, rates)
        makers = {"torch": _torch_attention, "FlashInfer paged": _paged}
        if case.is_full:
            makers["FlashInfer ragged"] = _ragged
        for name, maker in makers.items():
            prepare = partial(maker, shape, work)
            yield f"attention, {case.name}, {name}", floor, prepare
    for rows in HEAD_ROWS:
        yield (
            f"head, {rows} rows",
            head_floor(shape, rows, rates),
            partial(_head, shape, rows),
        )
        read = floor_of(0, rows * shape.vocab * LOGIT_BYTES, rates)
        for want in ("PROBABILITY", "NEGATIVE_ENTROPY"):
            yield (
                f"row statistics, {want.lower().replace('_', ' ')}, {rows} rows",
                read,
                partial(_statistics, shape, rows, want),
            )


def measure_part(part: Part) -> dict[str, Any]:
    """One line of the table: milliseconds, floor and their ratio."""
    name, floor, prepare = part
    ms = timed(prepare(), "cuda")
    torch.cuda.empty_cache()
    return {"name": name, "ms": ms, "floor_ms": floor.ms, "of_floor": floor.ms / ms}


def _noise(*size: int) -> torch.Tensor:
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


def _qkv(
    shape: ModelShape, work: Work
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q ``(B * window, H, D)``, k and v ``(B * context, H_kv, D)`` for B canvases."""
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_dim
    num_q, num_kv = work.batch * work.window, work.batch * work.context
    k, v = _noise(2, num_kv, kv_heads, size)
    return _noise(num_q, heads, size), k, v


def _torch_attention(shape: ModelShape, work: Work) -> Call:
    q, k, v = (
        part.unflatten(0, (work.batch, -1)).transpose(1, 2).contiguous()
        for part in _qkv(shape, work)
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(q, k, v, enable_gqa=shape.heads != shape.kv_heads)


def _ends(length: int, batch: int) -> torch.Tensor:
    ends = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    return ends * length


def _workspace() -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _paged(shape: ModelShape, work: Work) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    q, k, v = _qkv(shape, work)
    num_pages = work.batch * work.context
    # A pool in use hands out slots in any order.
    pages = torch.randperm(num_pages, device="cuda").to(torch.int32)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    wrapper.plan(
        _ends(work.window, work.batch),
        _ends(work.context, work.batch),
        pages,
        torch.ones(work.batch, dtype=torch.int32, device="cuda"),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        1,
        causal=False,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    pool = k[:, None], v[:, None]
    return lambda: wrapper.run(q, pool)


def _ragged(shape: ModelShape, work: Work) -> Call:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    q, k, v = _qkv(shape, work)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(_workspace(), "NHD")
    wrapper.plan(
        _ends(work.window, work.batch),
        _ends(work.context, work.batch),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        causal=False,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return lambda: wrapper.run(q, k, v)


def _head(shape: ModelShape, rows: int) -> Call:
    x, weight = _noise(rows, shape.hidden), _noise(shape.vocab, shape.hidden)
    return lambda: torch.nn.functional.linear(x, weight)


def _statistics(shape: ModelShape, rows: int, want: str) -> Call:
    from sglang_dllm.kernels.row_statistics import Want, row_statistics

    logits = torch.randn(rows, shape.vocab, device="cuda")
    return lambda: row_statistics(logits, 0, 1e-12, Want[want])
