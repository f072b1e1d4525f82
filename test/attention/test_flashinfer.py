"""FlashInfer alone: how often its wrappers are planned, and with which arguments.

``test_base.py`` has the tests that all backends share.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from flashinfer import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)

from helpers.attention_batches import (
    WINDOWS,
    Batch,
    assert_right,
    buckets_of,
    graph_windows,
    moved,
    plan_bucket,
    plan_of,
    pool_size,
    random_batch,
)
from helpers.flashinfer_shadows import attention_for, half_batch
from sglang_dllm.attention.flashinfer import FlashInferCanvasAttention
from sglang_dllm.attention.plan import AttentionPlan


def plans(attention: FlashInferCanvasAttention) -> tuple[int, int]:
    return attention._ragged.wrapper.plans, attention._paged.wrapper.plans


@pytest.mark.parametrize("name", ["windows", "interleaved", "full, kept"])
def test_an_fp8_pool(name: str) -> None:
    batch = half_batch(name, (4, 2), pool_dtype=torch.float8_e4m3fn)
    attention = attention_for(batch)
    attention.plan(batch.plan)
    assert_right(attention, batch)


@pytest.mark.parametrize("name", WINDOWS)
def test_each_wrapper_is_planned_once_for_the_same_windows(name: str) -> None:
    batch = half_batch(name, (4, 2))
    attention = attention_for(batch)
    attention.plan(batch.plan)
    before = plans(attention)
    is_full = [window.is_full for window in batch.plan.windows]
    assert before == (any(is_full), not all(is_full))
    windows = [replace(window) for window in batch.plan.windows]
    again = replace(batch, plan=AttentionPlan(windows, torch.tensor([0])))
    attention.plan(again.plan)
    assert plans(attention) == before
    assert_right(attention, again)


def test_a_window_that_moves_is_not_planned_again_but_written_elsewhere() -> None:
    batch = half_batch("interleaved", (4, 2))
    attention = attention_for(batch)
    attention.plan(batch.plan)
    before = plans(attention)
    other = replace(batch, plan=moved(batch.plan))
    attention.plan(other.plan)
    assert plans(attention) == before
    assert_right(attention, other)


def test_a_refresh_between_windows_costs_no_plan() -> None:
    windows = [(3, 7, 9, True), (0, 4, 21, True)]
    plan = plan_of(windows)
    refresh = AttentionPlan(
        [replace(window, start=0, end=window.canvas_len) for window in plan.windows],
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
    before = half_batch("windows", (4, 2))
    attention = attention_for(batch)
    attention.plan(before.plan)
    wrapper = attention._paged.wrapper
    good = wrapper.plan

    def bad(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("workspace")

    wrapper.plan = bad
    for _ in range(2):
        with pytest.raises(RuntimeError, match="workspace"):
            attention.plan(batch.plan)
    wrapper.plan = good
    # The wrapper may hold a part of the failed plan.
    attention.plan(before.plan)
    assert wrapper.plans == 2
    assert_right(attention, before)
    attention.plan(batch.plan)
    assert_right(attention, batch)


def test_a_graph_is_planned_again_only_for_other_canvases() -> None:
    batch = half_batch("windows", (4, 2))
    attention = attention_for(batch)
    plan = plan_of(graph_windows(9, 40))
    for again in (plan, plan, moved(plan)):
        plan_bucket(attention, again)
        attention.plan(batch.plan)
    forward = buckets_of(attention)[2, 4]
    assert forward.paged.wrapper.plans == 1
    plan_bucket(attention, plan_of(graph_windows(9, 40), seed=1))
    assert forward.paged.wrapper.plans == 2


def test_the_pinned_workspace_holds_no_garbage() -> None:
    """In a graph without split keys, programs without work read entries that no plan
    has written."""
    attention = attention_for(half_batch("windows", (4, 2)))
    plan_bucket(attention, plan_of(graph_windows(9, 40)))
    wrappers = attention._ragged, attention._paged, buckets_of(attention)[2, 4].paged
    for planned in wrappers:
        assert not planned.wrapper._pin_memory_int_workspace_buffer.any()
    for wrapper in (
        BatchPrefillWithRaggedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
    ):
        source = inspect.getsource(wrapper.__init__)
        assert "self._pin_memory_int_workspace_buffer = torch.empty(" in source


@pytest.mark.parametrize("num_windows", [1, 8, 64])
def test_large_graphs_are_planned_without_splitting(num_windows: int) -> None:
    """Their partial results would not fit the workspace."""
    batch = half_batch("windows", (4, 2))
    attention = attention_for(batch)
    plan_bucket(attention, plan_of(graph_windows(*[20] * num_windows)))
    forward = attention._forward
    assert forward is not None
    # Per tile 4 heads * 128 queries * 17 numbers * 4 bytes = 34 KiB, of 1 MiB.
    wrapper = forward.paged.wrapper
    assert wrapper.said["disable_split_kv"] == (num_windows == 64)


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
    again = replace(
        batch, plan=AttentionPlan(batch.plan.windows, batch.plan.logits_indices)
    )
    attention.plan(again.plan)
    assert_right(attention, again)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["windows", "interleaved"])
def test_flashinfer_reads_an_fp8_pool(name: str) -> None:
    batch = on_gpu(name, (8, 8), pool_dtype=torch.float8_e4m3fn)
    attention = attention_for(batch, shadows=False)
    attention.plan(batch.plan)
    assert_right(attention, batch)
