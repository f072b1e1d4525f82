"""Forwards of windows in graphs equal eager ones; a recording stands for a capture."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.other_process import run_module
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window
from sglang_dllm.runtime.graphs import (
    Limits,
    WindowGraphs,
    bucket_of,
    padded_plan,
    padded_tokens,
    window_graphs,
)


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
    for num_rows, length, num_logits, statistics in case["buckets"]:
        assert num_rows in (1, 4) and length in (32, 64)
        assert num_logits <= num_rows * length
        read |= set(statistics)
    assert read == {"negative_entropy", *["probability"] * (name != "alone")}


def test_a_graph_keeps_what_it_computes_of_the_logits(cases: dict[str, Any]) -> None:
    case = cases["in turn"]
    assert case["graphs"] == case["eager"]
    first, second, *later = case["captured"]
    # The other algorithm's statistic comes to it, and then both are there.
    assert 0 < first < second
    assert later == [second, second]


def test_a_batch_with_a_full_row_runs_eagerly(cases: dict[str, Any]) -> None:
    case = cases["with one that has no cache"]
    assert case["graphs"] == case["eager"]
    # Only once the canvas without a cache was done.
    assert case["num_replayed"] < cases["three"]["num_replayed"]


def test_forwards_run_between_rounds_and_wait_for_nothing_but_their_launch(
    cases: dict[str, Any],
) -> None:
    case = cases["ahead"]
    assert case["graphs"] == case["eager"]
    events = case["events"]
    pairs = list(pairwise(events))
    # What a graph reads is in place before the host waits, unless the window moves.
    assert pairs.count(("look", "replay")) > pairs.count(("look", "stage")) > 0
    assert pairs.count(("replay", "stage")) > 0 == pairs.count(("stage", "stage"))


def test_a_capture_that_fails_turns_graphs_off(cases: dict[str, Any]) -> None:
    case = cases["without memory"]
    assert case["graphs"] == case["eager"]
    assert case["buckets"] == []


def plan_of(*windows: tuple[int, int, int], kept: bool = True) -> AttentionPlan:
    rows = [
        Window(start, end, length, torch.arange(length) if kept else None)
        for start, end, length in windows
    ]
    return AttentionPlan(rows, torch.tensor([0]))


def graphs_of(limits: Limits) -> WindowGraphs:
    nothing = SimpleNamespace()
    return WindowGraphs(nothing, nothing, nothing, nothing, limits, lambda run: run)  # type: ignore[arg-type]


def test_the_gate() -> None:
    graphs = graphs_of(Limits(batch_sizes=(1, 2), windows=(8, 32)))
    assert graphs.accepts(plan_of((3, 11, 40)))
    assert graphs.accepts(plan_of((3, 11, 40), (0, 32, 64)))
    assert not graphs.accepts(plan_of((3, 11, 40), (0, 40, 40)))  # a full prefill
    assert not graphs.accepts(plan_of((0, 33, 40)))  # wider than any bucket
    assert not graphs.accepts(plan_of(*[(0, 8, 40)] * 3))  # more than any bucket
    assert not graphs.accepts(plan_of((0, 8, 40), kept=False))
    nothing = AttentionPlan(
        plan_of((3, 11, 40)).rows, torch.zeros(0, dtype=torch.int64)
    )
    assert not graphs.accepts(nothing)  # no candidate


def test_padding_repeats_what_is_there() -> None:
    plan = plan_of((3, 6, 9), (0, 4, 7))
    padded = padded_plan(plan, 4, 5)
    assert padded.lens == [5] * 4
    assert padded.kept is not None
    assert padded.kept[1].tolist() == [3, 4, 5, 5, 5, *[0, 1, 2, 3, 3] * 3]
    tokens = padded_tokens(plan, 4, 5)
    assert tokens.tolist() == [0, 1, 2, 2, 2, *[3, 4, 5, 6, 6] * 3]
    assert bucket_of(5, (1, 4, 8)) == 8
    assert bucket_of(9, (1, 4, 8)) is None


FLAGS = {
    "disable_decode_cuda_graph": False,
    "cuda_graph_bs_decode": None,
    "cuda_graph_max_bs_decode": None,
    "tp_size": 1,
}


def test_flags_keep_their_meaning() -> None:
    def sizes(**flags: Any) -> list[int]:
        args = SimpleNamespace(**FLAGS | flags)
        return list(Limits.from_server_args(args).batch_sizes)

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
        args, nothing = SimpleNamespace(**FLAGS | flags), SimpleNamespace()
        assert window_graphs(runner, args, nothing) is None  # type: ignore[arg-type]
    assert [reason in record.getMessage() for record in caplog.records] == [True]
