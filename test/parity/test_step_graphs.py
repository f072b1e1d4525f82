"""Whole steps in graphs equal eager ones; a recording stands for a CUDA capture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.other_process import run_module
from helpers.tiny_checkpoints import write_dream
from helpers.tiny_llama_checkpoints import DIFFULLAMA_FLAGS, write_diffullama
from sglang_dllm.demo import demo_path

MULTI = "FullAttnMultiBlock"
CACHED: list[tuple[str, dict[str, Any], bool]] = [
    (MULTI, {"cache": "none"}, True),
    (MULTI, {"cache": "dual", "block_size": 16}, False),
    (MULTI, {"cache": "prefix", "block_size": 16}, True),
    (MULTI, {"cache": "delayed", "block_size": 16}, True),
]
OTHERS: list[tuple[str, dict[str, Any], bool]] = [
    (MULTI, {"cache": "vicinity", "block_size": 8}, False),
    ("LLaDA", {"cache": "dual", "block_size": 16}, True),
    ("FastDLLM", {"cache": "none"}, True),
    ("Credit", {"cache": "prefix", "block_size": 16}, False),
    ("AdaBlock", {"cache": "dual", "block_size": 16}, True),
]
DREAM: list[tuple[str, dict[str, Any], bool]] = [
    ("Dream", {"cache": "none", "steps": 20}, True),
    ("FastDLLM", {"cache": "dual", "block_size": 16}, False),
]
MODELS: dict[str, tuple[Callable[[Path], Path], list[Any], Sequence[str]]] = {
    # SGLang's experts on a CPU count their tokens on the host, so no MoE is recorded.
    "llada": (lambda path: demo_path(), CACHED + OTHERS, ()),
    "dream": (write_dream, CACHED + DREAM, ()),
    "diffullama": (write_diffullama, CACHED[:2], DIFFULLAMA_FLAGS),
}


@pytest.mark.parametrize("family", MODELS)
def test_captured_steps_decode_the_same(family: str, tmp_path: Path) -> None:
    write, cases, flags = MODELS[family]
    path = write(tmp_path / "model")
    out = run_module("helpers.run_step_graphs", path, json.dumps(cases), *flags)
    # SGLang prints to the same stream.
    found = json.loads(out.splitlines()[-1])
    assert len(found) == len(cases)
    for case, result in zip(cases, found, strict=True):
        assert result["captured"] == result["eager"], case
        assert result["num_captured"] > 0, case
        # Between two replays the host reads what a step committed, and that is all.
        assert not any(result["between"]), case
    assert sum(len(result["between"]) for result in found) > 10
