"""FlashInfer canvas attention equals the oracle; without a GPU, on shadows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.attention_batches import (
    WINDOWS,
    Batch,
    expected,
    plan_of,
    pool_size,
    random_batch,
)
from helpers.flashinfer_shadows import assert_right, attention_for, half_batch
from sglang_dllm.attention.flashinfer import FlashInferCanvasAttention
from sglang_dllm.attention.plan import AttentionPlan

HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["mha", "gqa"])


def plans(attention: FlashInferCanvasAttention) -> tuple[int, int]:
    return attention._ragged.wrapper.plans, attention._paged.wrapper.plans


@HEADS
@pytest.mark.parametrize("name", WINDOWS)
def test_equals_the_oracle(name: str, heads: tuple[int, int]) -> None:
    batch = half_batch(name, heads)
    attention = attention_for(batch)
    attention.plan(batch.plan)
    assert_right(attention, batch)
    assert_right(attention, batch)  # the next layer


@pytest.mark.parametrize("name", ["windows", "interleaved", "full, kept"])
def test_an_fp8_pool(name: str) -> None:
    batch = half_batch(name, (4, 2), pool_dtype=torch.float8_e4m3fn)
    attention = attention_for(batch)
    attention.plan(batch.plan)
    assert_right(attention, batch)


@pytest.mark.parametrize("name", WINDOWS)
def test_the_same_rows_are_planned_once(name: str) -> None:
    batch = half_batch(name, (4, 2))
    attention = attention_for(batch)
    attention.plan(batch.plan)
    before = plans(attention)
    is_full = [row.is_full for row in batch.plan.windows]
    assert before == (any(is_full), not all(is_full))
    # A new plan of new rows, as every forward has one; the slots are the canvas's.
    rows = [replace(row) for row in batch.plan.windows]
    again = replace(batch, plan=AttentionPlan(rows, torch.tensor([0])))
    attention.plan(again.plan)
    assert plans(attention) == before
    assert_right(attention, again)


def test_a_window_that_moves_is_not_planned_again_but_written_elsewhere() -> None:
    batch = half_batch("interleaved", (4, 2))
    attention = attention_for(batch)
    attention.plan(batch.plan)
    before = plans(attention)
    rows = [
        row if row.is_full else replace(row, start=row.start - 1, end=row.end - 1)
        for row in batch.plan.windows
    ]
    moved = replace(batch, plan=AttentionPlan(rows, torch.tensor([0])))
    attention.plan(moved.plan)
    assert plans(attention) == before
    assert_right(attention, moved)


def test_a_refresh_between_windows_costs_no_plan() -> None:
    windows = [(3, 7, 9, True), (0, 4, 21, True)]
    plan = plan_of(windows)
    refresh = AttentionPlan(
        [replace(row, start=0, end=row.canvas_len) for row in plan.windows],
        plan.logits_indices,
    )
    batches = [random_batch(p, pool_size(windows), (2, 2), dtype=torch.float16)
               for p in (refresh, plan)]  # fmt: skip
    attention = attention_for(batches[0])
    for batch in batches * 3:
        attention.plan(batch.plan)
        assert_right(attention, batch)
    assert plans(attention) == (1, 1)


def test_other_slots_or_lengths_are_planned() -> None:
    windows = WINDOWS["windows"]
    batch = half_batch("windows", (4, 2))
    attention = attention_for(batch)
    for seed, changed in enumerate([windows, windows, windows[:-1], windows[:-1]]):
        plan = plan_of(changed, seed)
        other = random_batch(plan, pool_size(windows), (4, 2), dtype=torch.bfloat16)
        attention.plan(plan)
        assert_right(attention, other)
    assert plans(attention) == (0, 4)


def test_a_failed_plan_is_not_taken_for_a_good_one() -> None:
    batch = half_batch("interleaved", (4, 2))
    attention = attention_for(batch)
    wrapper = attention._paged.wrapper
    good = wrapper.plan

    def bad(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("workspace")

    wrapper.plan = bad
    with pytest.raises(RuntimeError, match="workspace"):
        attention.plan(batch.plan)
    wrapper.plan = good
    attention.plan(batch.plan)
    assert_right(attention, batch)


def graph_windows(*canvas_lens: int, length: int = 4) -> list[tuple]:
    starts = [min(n // 3, n - length) for n in canvas_lens]
    return [(i, i + length, n, True) for i, n in zip(starts, canvas_lens, strict=True)]


class Recorded:
    """A layer's writes and runs as a CUDA graph would hold them: by address."""

    def __init__(self, attention: FlashInferCanvasAttention, batch: Batch) -> None:
        self.batch = batch
        self.writes: list[tuple[torch.Tensor, ...]] = []
        forward = attention._forward
        assert forward is not None
        assert forward.paged is not None
        self.wrapper = forward.paged.wrapper
        self.wrapper.runs.clear()
        self.out = attention.run(
            batch.q, batch.k, batch.v, *batch.pools, write=self.write
        )

    def write(self, *args: torch.Tensor) -> None:
        self.writes.append(args)
        slots, k, v = args
        self.batch.k_pool[slots], self.batch.v_pool[slots] = k, v

    def replay(self) -> torch.Tensor:
        for slots, k, v in self.writes:
            self.batch.k_pool[slots], self.batch.v_pool[slots] = k, v
        ((args, kwargs),) = self.wrapper.runs
        self.wrapper.run(*args, **kwargs)
        self.wrapper.runs.pop()
        return self.out


@HEADS
def test_a_graph_is_replayed_for_other_canvases(heads: tuple[int, int]) -> None:
    """Static inputs are refilled, the plan is made anew, and nothing else is done."""
    size, dtype = 200, torch.bfloat16
    first = random_batch(plan_of(graph_windows(9, 40, 12)), size, heads, dtype=dtype)
    static = replace(first, q=first.q.contiguous())
    attention = attention_for(first)
    attention.plan(static.plan, graph=True)
    recorded = Recorded(attention, static.copy())
    torch.testing.assert_close(
        recorded.out.float(), expected(first)[0], atol=1e-2, rtol=1e-2
    )
    other_bucket = plan_of(graph_windows(30, 31, length=8))
    for seed, lens in enumerate([(70, 5, 33), (4, 4, 4), (20, 20, 150)]):
        plan = plan_of(graph_windows(*lens), seed + 1)
        batch = random_batch(plan, size, heads, dtype=dtype, seed=seed + 1)
        attention.plan(plan_of(WINDOWS["interleaved"]))
        attention.plan(plan, graph=True)
        attention.plan(other_bucket, graph=True)
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(recorded.batch, name).copy_(getattr(batch, name))
        out = recorded.replay()
        # A window that is its whole canvas is read from the pool here: the same.
        wanted, *pools = expected(batch)
        torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
        assert torch.equal(recorded.batch.k_pool, pools[0])
        assert torch.equal(recorded.batch.v_pool, pools[1])
    assert recorded.wrapper.plans == 4
    attention.plan(plan, graph=True)
    assert recorded.wrapper.plans == 4


def test_rows_that_pad_a_graph_repeat_others() -> None:
    plan = plan_of(graph_windows(9, 40))
    padded = AttentionPlan([*plan.windows, plan.windows[1]], plan.logits_indices)
    batch = random_batch(plan, 60, (4, 2), dtype=torch.bfloat16)
    twice = {
        name: torch.cat([getattr(batch, name), getattr(batch, name)[4:]])
        for name in ("q", "k", "v")
    }
    attention = attention_for(batch)
    attention.plan(padded, graph=True)
    own = replace(batch.copy(), plan=padded, **twice)
    out = attention.run(own.q, own.k, own.v, *own.pools)
    wanted, *pools = expected(batch)
    torch.testing.assert_close(out[:8].float(), wanted, atol=1e-2, rtol=1e-2)
    assert torch.equal(out[8:], out[4:8])
    assert torch.equal(own.k_pool, pools[0])
    assert torch.equal(own.v_pool, pools[1])


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([(0, 4, 9, True), (0, 5, 9, True)], "one length"),
        ([(0, 4, 9, True), (0, 4, 4, False)], "a window needs"),
    ],
)
def test_a_graph_refuses_other_rows(windows: list, said: str) -> None:
    attention = attention_for(half_batch("windows", (4, 2)))
    with pytest.raises(ValueError, match=said):
        attention.plan(plan_of(windows), graph=True)


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_great_graphs_are_planned_without_splitting(num_rows: int) -> None:
    """Their partial results would not fit the workspace."""
    batch = half_batch("windows", (4, 2))
    attention = attention_for(batch)
    attention.plan(plan_of(graph_windows(*[20] * num_rows)), graph=True)
    forward = attention._forward
    assert forward is not None
    assert forward.paged is not None
    # Per tile 4 heads * 128 queries * 17 numbers * 4 bytes = 34 KiB, of 1 MiB.
    wrapper = forward.paged.wrapper
    assert wrapper.said["disable_split_kv"] == (num_rows == 64)


def test_deterministic_inference_splits_nothing() -> None:
    batch = half_batch("interleaved", (4, 2))
    for flag in (False, True):
        attention = attention_for(batch, is_deterministic=flag)
        attention.plan(batch.plan)
        for planned in (attention._ragged, attention._paged):
            assert planned.wrapper.said["disable_split_kv"] == flag


def test_fp32_is_refused_with_a_way_out() -> None:
    batch = half_batch("windows", (4, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="--attention-backend triton"):
        attention_for(batch)


def on_gpu(name: str, heads: tuple[int, int], **given: Any) -> Batch:
    return half_batch(name, heads, **{"head_dim": 128, **given}).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (28, 4)], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", WINDOWS)
def test_flashinfer_equals_the_oracle(name: str, heads: tuple[int, int]) -> None:
    batch = on_gpu(name, heads)
    attention = attention_for(batch, shadows=False)
    attention.plan(batch.plan)
    assert_right(attention, batch)
    moved = replace(
        batch, plan=AttentionPlan(batch.plan.windows, batch.plan.logits_indices)
    )
    attention.plan(moved.plan)
    assert_right(attention, moved)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["windows", "interleaved"])
def test_flashinfer_reads_an_fp8_pool(name: str) -> None:
    batch = on_gpu(name, (8, 8), pool_dtype=torch.float8_e4m3fn)
    attention = attention_for(batch, shadows=False)
    attention.plan(batch.plan)
    assert_right(attention, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 32])
def test_flashinfer_in_a_cuda_graph(num_rows: int) -> None:
    """Captured once, replayed for canvases of other lengths at other slots."""
    size, heads = 160 * num_rows + 5, (8, 8)

    def batch_of(seed: int, make: Callable[[int], int]) -> Batch:
        lens = [make(row) for row in range(num_rows)]
        plan = plan_of(graph_windows(*lens, length=32), seed)
        batch = random_batch(
            plan, size, heads, head_dim=128, dtype=torch.bfloat16, seed=seed
        )
        return batch.to("cuda")

    static = batch_of(0, lambda row: 100)
    static = replace(static, q=static.q.contiguous())
    attention = attention_for(static, shadows=False)

    def forward() -> torch.Tensor:
        return attention.run(static.q, static.k, static.v, *static.pools)

    attention.plan(static.plan, graph=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for seed in (1, 2, 3):
        batch = batch_of(seed, lambda row: 40 + (37 * row * seed) % 120)  # noqa: B023
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(static, name).copy_(getattr(batch, name))
        attention.plan(plan_of(WINDOWS["one window"]))
        attention.plan(batch.plan, graph=True)
        graph.replay()
        wanted, *pools = expected(batch.to("cpu"))
        torch.testing.assert_close(out.float().cpu(), wanted, atol=1e-2, rtol=1e-2)
        assert torch.equal(static.k_pool.cpu(), pools[0])
        assert torch.equal(static.v_pool.cpu(), pools[1])
