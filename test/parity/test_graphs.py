"""Forwards in graphs equal eager ones; a recording stands for a CUDA capture."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.other_process import run_module
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.plan import plan_of as plan_of_batch
from sglang_dllm.decoding.window import Window
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.runtime.forward_batch import CanvasForwardBatch
from sglang_dllm.runtime.graph_buckets import GraphLimits, smallest, window_lengths
from sglang_dllm.runtime.graph_padding import padded_plan, padding_indices
from sglang_dllm.runtime.graphs import WindowGraphs, window_graphs


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    out = run_module("helpers.run_graphs")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["alone", "two", "three"])
def test_padded_windows_decode_the_same(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert case["graphs"] == case["eager"]
    assert 0 < case["num_captured"] == len(case["buckets"]) < case["num_replayed"]
    read = set()
    for num_windows, length, num_logits, statistics in case["buckets"]:
        assert num_windows in (1, 4) and length in (32, 64)
        assert num_logits <= num_windows * length
        read |= set(statistics)
    assert read == {"negative_entropy", *["probability"] * (name != "alone")}


def test_a_graph_keeps_what_it_computes_of_the_logits(cases: dict[str, Any]) -> None:
    case = cases["in turn"]
    assert case["graphs"] == case["eager"]
    first, second, *later = case["captured"]
    # The other algorithm's statistic comes to it, and then both are there.
    assert 0 < first < second
    assert later == [second, second]


def test_a_batch_with_a_full_window_runs_eagerly(cases: dict[str, Any]) -> None:
    case = cases["with one that has no cache"]
    assert case["graphs"] == case["eager"]
    # Graphs run only after the canvas without a cache is done.
    assert case["num_replayed"] < cases["three"]["num_replayed"]


def test_a_forward_in_flight_between_rounds_is_a_graph_too(
    cases: dict[str, Any],
) -> None:
    case = cases["ahead"]
    assert case["graphs"] == case["eager"]


def test_a_capture_that_fails_turns_graphs_off(cases: dict[str, Any]) -> None:
    case = cases["without memory"]
    assert case["graphs"] == case["eager"]
    assert case["buckets"] == []


def plan_of(*windows: tuple[int, int, int], has_slots: bool = True) -> AttentionPlan:
    found = [
        Window(start, end, length, torch.arange(1, 1 + length) if has_slots else None)
        for start, end, length in windows
    ]
    return AttentionPlan(found, torch.tensor([0]))


def graphs_of(limits: GraphLimits) -> WindowGraphs:
    nothing = SimpleNamespace()
    return WindowGraphs(nothing, nothing, nothing, nothing, limits, lambda run: run)  # type: ignore[arg-type]


def test_the_gate() -> None:
    graphs = graphs_of(GraphLimits(batch_sizes=(1, 2), lengths=(8, 32)))
    assert graphs.accepts(plan_of((3, 11, 40)))
    assert graphs.accepts(plan_of((3, 11, 40), (0, 32, 64)))
    assert not graphs.accepts(plan_of((3, 11, 40), (0, 40, 40)))  # a full prefill
    assert not graphs.accepts(plan_of((0, 33, 40)))  # wider than any bucket
    assert not graphs.accepts(plan_of(*[(0, 8, 40)] * 3))  # more than any bucket
    assert not graphs.accepts(plan_of((0, 8, 40), has_slots=False))
    nothing = AttentionPlan(
        plan_of((3, 11, 40)).windows, torch.zeros(0, dtype=torch.int64)
    )
    assert not graphs.accepts(nothing)  # no candidate


def test_padding_repeats_tokens_and_writes_to_the_dummy_slot() -> None:
    """Two equal tokens may get keys that differ in the last bit. Written to one slot,
    they would make a run depend on which write comes last."""
    plan = plan_of((3, 6, 9), (0, 4, 7))
    padded = padded_plan(plan, 4, 5)
    assert padded.lens == [5] * 4
    assert padded.kv_writes is not None
    tokens, slots = padded.kv_writes
    assert tokens == slice(None)
    assert slots.tolist() == [4, 5, 6, 0, 0, 1, 2, 3, 4, 0, *[0] * 10]
    sources, places = padding_indices(plan.lens, 4, 5)
    assert sources.tolist() == [0, 1, 2, 2, 2, *[3, 4, 5, 6, 6] * 3]
    assert places.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert sources[places].tolist() == list(range(7))
    assert smallest((1, 4, 8), 5) == 8
    assert smallest((1, 4, 8), 9) is None


def facts_of(architecture: str) -> ModelFacts:
    return ModelFacts(FAMILIES[architecture], 0, (1,), 100)


def test_the_window_of_a_block_fills_its_bucket_whatever_the_shift() -> None:
    """The windows of a shifted family begin one token earlier. In buckets of 32, 64 and
    128 tokens, a block of 32 would be padded to 64, and one with neighbours to 128."""
    args = SimpleNamespace(**FLAGS)
    for architecture, shift in (("LLaDAModelLM", 0), ("DreamModel", 1)):
        facts = facts_of(architecture)
        assert window_lengths(facts) == (32 + shift, 64 + shift, 128 + shift)
        limits = GraphLimits.from_server_args(args, facts)
        for span in (32, 64):
            plan = plan_of((40 - shift, 40 + span, 200))
            assert plan.lens == [span + shift]
            assert limits.fit(plan) == (1, span + shift)
        assert limits.fit(plan_of((0, 129 + shift, 200))) is None


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


FLAGS = {
    "disable_decode_cuda_graph": False,
    "cuda_graph_bs_decode": None,
    "cuda_graph_max_bs_decode": None,
    "tp_size": 1,
}


def test_flags_keep_their_meaning() -> None:
    def sizes(**flags: Any) -> list[int]:
        args = SimpleNamespace(**FLAGS | flags)
        limits = GraphLimits.from_server_args(args, facts_of("LLaDAModelLM"))
        return list(limits.batch_sizes)

    assert sizes() == [1, 2, 4, 8, 16]
    assert sizes(cuda_graph_max_bs_decode=6) == [1, 2, 4, 6]
    assert sizes(cuda_graph_bs_decode=[3, 5]) == [3, 5]
    assert sizes(disable_decode_cuda_graph=True) == []


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
        assert window_graphs(runner, args, facts_of("DreamModel")) is None
    assert [reason in record.getMessage() for record in caplog.records] == [True]
