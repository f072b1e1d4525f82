"""Forwards in graphs equal eager ones; a recording stands for a CUDA capture."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.other_process import run_module
from helpers.recorded_capture import grid_of
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.plan import plan_of as plan_of_batch
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.window import Window
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.forward_graph import padding_indices
from sglang_dllm.runtime.graph_grid import Bucket, GraphGrid
from sglang_dllm.runtime.graphs import Captured, model_graphs


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    out = run_module("helpers.run_graphs")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "name", ["alone", "two", "three", "exact", "mixed", "guided", "ahead"]
)
def test_forwards_in_graphs_decode_the_same(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert case["graphs"] == case["eager"]


def test_all_graphs_are_captured_before_the_first_request(
    cases: dict[str, Any],
) -> None:
    for name in ("alone", "two", "three", "exact", "mixed"):
        case = cases[name]
        assert case["captures"] == [6, 6] and len(case["buckets"]) == 6
        assert set(case["launches"]) == {"forward_graph"}


def test_a_forward_outside_of_the_grid_runs_eagerly_and_is_counted(
    cases: dict[str, Any],
) -> None:
    launches = cases["guided"]["launches"]
    assert launches["eager guided"] > 0 < launches["forward_graph"]


def test_a_capture_without_memory_leaves_the_others(cases: dict[str, Any]) -> None:
    """The largest buckets come first, and those are the ones that failed."""
    case = cases["without memory"]
    assert case["graphs"] == case["eager"]
    assert case["buckets"] == [[4, 32], [1, 96], [1, 64], [1, 32]]
    assert case["launches"]["eager not_captured"] > 0


def plan_of(*windows: tuple[int, int, int]) -> AttentionPlan:
    found = [Window(*window, torch.arange(1, 1 + window[2])) for window in windows]
    return AttentionPlan(found, torch.tensor([0]))


def canvas(start: int, end: int, length: int, num_windows: int = 1) -> Canvas:
    made = Canvas.from_prompt(
        range(length), 0, mask_id=0, eos_ids=(1,), num_windows=num_windows
    )
    made.window = (start, end)
    return made


GRID = grid_of((1, 2), (8, 32))


def captured(**changes: Any) -> Captured:
    return replace(Captured(GRID, set(GRID.buckets), 64, True), **changes)


def test_the_gate() -> None:
    gate = captured().why_eager
    assert gate([canvas(3, 11, 40)]) is None
    assert gate([canvas(3, 11, 40), canvas(0, 32, 64)]) is None
    assert gate([canvas(0, 30, 30)]) is None  # a whole canvas
    assert gate([canvas(0, 33, 40)]) == "no_bucket"
    assert gate([canvas(0, 8, 40)] * 3) == "no_bucket"
    assert gate([canvas(0, 8, 40), canvas(0, 8, 65)]) == "long_canvas"
    assert gate([canvas(0, 8, 40), canvas(0, 8, 30, num_windows=2)]) == "guided"
    small = captured(has_exact_pool=False).why_eager
    assert small([canvas(0, 30, 30)]) == "quantized_pool"
    assert small([canvas(0, 29, 30)]) is None
    few = captured(buckets={Bucket(1, 8)}).why_eager
    assert few([canvas(0, 8, 30)]) is None
    assert few([canvas(0, 9, 30)]) == "not_captured"


def test_padding_repeats_tokens() -> None:
    sources, places = padding_indices([3, 4], 4, 5)
    assert sources.tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 6, 6, *[0] * 10]
    assert places.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert sources[places].tolist() == list(range(7))


FLAGS = {
    "disable_decode_cuda_graph": False,
    "cuda_graph_bs_decode": None,
    "cuda_graph_max_bs_decode": None,
    "max_running_requests": 32,
    "tp_size": 1,
}


def declared(
    architecture: str = "LLaDAModelLM",
    block_size: int | None = 32,
    max_canvas_len: int = 4096,
    **flags: Any,
) -> GraphGrid:
    return GraphGrid.declared(
        SimpleNamespace(**FLAGS | flags),
        FAMILIES[architecture],
        block_size=block_size,
        max_canvas_len=max_canvas_len,
    )


@pytest.mark.parametrize(
    ("architecture", "shift"), [("LLaDAModelLM", 0), ("DreamModel", 1)]
)
def test_the_window_of_a_block_fills_its_bucket_whatever_the_shift(
    architecture: str, shift: int
) -> None:
    """The windows of a shifted family begin one token earlier. In buckets of 32, 64 and
    128 tokens, a block of 32 would be padded to 64, and one with neighbours to 128."""
    grid = declared(architecture)
    for span in (32, 64, 128):
        assert grid.fit([span + shift]) == (1, span + shift)
        assert grid.fit([span + shift] * 3) == (4, span + shift)
    assert declared(architecture, block_size=48).fit([48 + shift]) == (1, 48 + shift)


def test_whole_canvases_have_graphs_where_they_do_not_fill_the_device() -> None:
    grid = declared()
    for length, bucket in ((130, 256), (257, 384), (400, 512), (512, 512)):
        assert grid.fit([length]) == (1, bucket)
    assert grid.fit([200, 256]) == (2, 256)
    assert grid.fit([200, 257]) is grid.fit([513]) is None
    assert grid.fit([128] * 16) == (16, 128)
    assert grid.fit([128] * 17) is None
    tokens = [bucket.num_tokens for bucket in grid.buckets]
    assert tokens == sorted(tokens)


def test_the_grid_holds_nothing_that_cannot_come() -> None:
    grid = declared(max_canvas_len=60, max_running_requests=3)
    assert {bucket.length for bucket in grid.buckets} == {32, 64}
    assert {bucket.num_windows for bucket in grid.buckets} == {1, 2, 4}


def test_flags_keep_their_meaning() -> None:
    def sizes(**flags: Any) -> list[int]:
        return sorted({bucket.num_windows for bucket in declared(**flags).buckets})

    assert sizes() == [1, 2, 4, 8, 16]
    assert sizes(cuda_graph_max_bs_decode=6) == [1, 2, 4, 6]
    assert sizes(cuda_graph_max_bs_decode=32) == [1, 2, 4, 8, 16, 32]
    assert sizes(cuda_graph_bs_decode=[3, 5]) == [3, 5]
    assert sizes(disable_decode_cuda_graph=True) == []


def test_the_plan_survives_the_ways_in_which_sglang_rebuilds_a_batch() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    ids, plan = torch.arange(3), plan_of((3, 6, 9))
    given = ForwardBatch(ForwardMode.DLLM_EXTEND, 1, ids, ids, ids, ids, 9)
    assert plan_of_batch(given) is None
    batch = CanvasForwardBatch.of(given, ids + 1, ids + 2, plan)
    rebuilt = replace(batch, input_ids=ids + 3)
    assert plan_of_batch(rebuilt) is plan_of_batch(batch) is plan
    assert rebuilt.positions is batch.positions
    assert rebuilt.out_cache_loc is given.out_cache_loc
    assert given.input_ids is ids
    other = plan_of((0, 3, 9))
    assert plan_of_batch(CanvasForwardBatch.of(batch, ids, ids, other)) is other


@pytest.mark.parametrize(
    ("device", "backend", "flags", "reason"),
    [
        ("cpu", "FlashInferAttnBackend", {}, "not a GPU"),
        ("cuda", "TorchNativeAttnBackend", {}, "TorchNativeAttnBackend cannot"),
        ("cuda", "TritonAttnBackend", {"tp_size": 2}, "tensor parallelism"),
        ("cuda", "TritonAttnBackend", {"disable_decode_cuda_graph": True}, "a flag"),
    ],
)
def test_why_there_are_none_is_logged_once(
    device: str,
    backend: str,
    flags: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = SimpleNamespace(device=device, attn_backend=type(backend, (), {})())
    with caplog.at_level("INFO"):
        args = SimpleNamespace(**FLAGS | flags)
        assert model_graphs(runner, args, None, None) is None  # type: ignore[arg-type]
    assert [reason in record.getMessage() for record in caplog.records] == [True]
