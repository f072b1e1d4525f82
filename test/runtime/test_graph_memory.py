"""The memory of CUDA graphs: estimated, and taken from the budget of the KV pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dllm.decoding.static_group import StepShape
from sglang_dllm.patches import gpu_memory
from sglang_dllm.runtime.graph_memory import (
    EAGER_BYTES,
    GRAPH_BYTES,
    MIB,
    GraphMemory,
    ModelSize,
    declared,
    estimate_graph_memory,
    reserve,
    settle_fraction,
)

LLADA = SimpleNamespace(
    hidden_size=4096,
    vocab_size=126464,
    dtype=torch.bfloat16,
    context_len=4096,
    hf_config=SimpleNamespace(
        architectures=["LLaDAModelLM"], intermediate_size=12288, mask_token_id=126336
    ),
)
SIZE = ModelSize.of_model_config(LLADA)

FLAGS = {
    "dllm_algorithm": "FullAttnMultiBlock",
    "dllm_algorithm_config": None,
    "attention_backend": "flashinfer",
    "device": "cuda",
    "tp_size": 1,
    "disable_decode_cuda_graph": False,
    "cuda_graph_bs_decode": None,
    "cuda_graph_max_bs_decode": None,
    "max_running_requests": 32,
    "mem_fraction_static": 0.9,
    "max_prefill_tokens": 16384,
}


def flags(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**FLAGS | changed)


def estimate(
    forwards: list[tuple[int, int]],
    steps: list[StepShape] | None = None,
    canvas_len: int = 4096,
    backend: str = "flashinfer",
) -> GraphMemory:
    return estimate_graph_memory(SIZE, forwards, steps or [], canvas_len, backend)


def test_the_sizes_of_a_model() -> None:
    assert ModelSize(4096, 12288, 126464, 2) == SIZE
    assert ModelSize.of_model_config(LLADA, tp_size=2) == ModelSize(
        4096, 6144, 63232, 2
    )
    moe = SimpleNamespace(num_experts_per_tok=8, expert_intermediate_size=1024)
    found = ModelSize.of_model_config(
        SimpleNamespace(**vars(LLADA) | {"hf_config": moe})
    )
    assert found.mlp_size == 8192


def test_no_graph_takes_no_memory() -> None:
    assert estimate([]).total == 0


def test_each_part_of_the_estimate() -> None:
    found = estimate([(4, 32)])
    assert found.attention == 8 * MIB + 4 * (4 * 4096 + 32 * 32)
    # (8 H + 3 M) numbers of 2 bytes for each of 128 tokens.
    assert found.activations == 128 * (8 * 4096 + 3 * 12288) * 2
    assert found.outputs == 128 * 4096 * 2
    assert (found.logits, found.graphs) == (0, GRAPH_BYTES)
    assert found.total == sum(found)
    # Graphs share one pool: the largest forward counts. The rest adds up.
    both = estimate([(4, 32), (2, 64)])
    assert both.activations == found.activations
    assert both.outputs == 2 * found.outputs
    assert both.graphs == 2 * found.graphs


def test_steps_add_logits_and_share_the_buffers_of_their_forwards() -> None:
    alone = estimate([(4, 32)])
    found = estimate([(4, 32)], [StepShape(4, 32, 32), StepShape(4, 32, 128)])
    assert found.attention == alone.attention + 16 * 4 * 4096
    assert found.graphs == 3 * alone.graphs
    assert found.logits == 128 * 126464 * 12
    # A head over more candidates runs in parts.
    many = estimate([], [StepShape(16, 128, 2048)])
    assert many.logits == 2**25 * 12


def test_slots_of_canvases_follow_the_longest_one() -> None:
    short, long = (estimate([(512, 32)], canvas_len=n) for n in (4096, 131072))
    assert long.attention - short.attention == 512 * 4 * (131072 - 4096)
    triton = estimate([(512, 32)], backend="triton")
    assert short.attention - triton.attention == 8 * MIB


def test_the_memory_is_a_known_one() -> None:
    """LLaDA-8B with d3LLM's launch flags: some 1.5 GiB."""
    forwards, steps = declared(flags(cuda_graph_max_bs_decode=32), LLADA)
    total = estimate(list(forwards), list(steps)).total
    assert 1024 * MIB < total < 2560 * MIB


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cpu"},
        {"tp_size": 2},
        {"attention_backend": "torch_native"},
        {"attention_backend": "another"},
        {"disable_decode_cuda_graph": True},
    ],
)
def test_nothing_is_reserved_where_graphs_are_off(changed: dict[str, Any]) -> None:
    assert tuple(map(list, declared(flags(**changed), LLADA))) == ([], [])
    found = flags(**changed)
    reserve(found, LLADA, None, 80 * 1024 * MIB)
    assert found.mem_fraction_static == 0.9


def test_a_share_of_sglang_leaves_room_for_graphs_and_eager_forwards() -> None:
    """SGLang leaves a rest of its own, which often holds them."""
    device, size = 80 * 1024 * MIB, SIZE
    found = flags(mem_fraction_static=0.99)
    reserve(found, LLADA, None, device)
    forwards, steps = declared(found, LLADA)
    needed = estimate(list(forwards), list(steps)).total
    eager = EAGER_BYTES + size.activation_bytes(found.max_prefill_tokens)
    assert found.mem_fraction_static == round(1 - (needed + eager) / device, 3) > 0.9
    enough = flags(mem_fraction_static=0.7)
    reserve(enough, LLADA, None, device)
    assert enough.mem_fraction_static == 0.7


def test_a_share_of_the_user_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    found = flags(mem_fraction_static=0.8)
    settle_fraction(found, 0.8, 10 * MIB, 0, 100 * MIB)
    assert not caplog.records
    settle_fraction(found, 0.8, 30 * MIB, 0, 100 * MIB)
    assert found.mem_fraction_static == 0.8
    (record,) = caplog.records
    assert "--mem-fraction-static=0.8 leaves 19 MiB" in record.getMessage()
    assert "about 30 MiB" in record.getMessage()


def test_the_hook_reserves_behind_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sglang_dllm.upstream.launch.architecture_of", lambda args: "LLaDAModelLM"
    )
    compat = "sglang_dllm.upstream.compat"
    monkeypatch.setattr(f"{compat}.in_effect", lambda args: args)
    monkeypatch.setattr(f"{compat}.set_flags", lambda args, settle: settle(args))
    monkeypatch.setattr(f"{compat}.model_config", lambda args: LLADA)
    monkeypatch.setattr(f"{compat}.device_mebibytes", lambda device: 80 * 1024)

    def derive(args: Any) -> None:
        if args.mem_fraction_static is None:
            args.mem_fraction_static = 0.97

    shares = []
    for given, device in ((None, "cuda"), (0.8, "cuda"), (None, "cpu")):
        found = flags(mem_fraction_static=given, device=device)
        gpu_memory._reserve(derive, found)
        shares.append(found.mem_fraction_static)
    assert 0.9 < shares[0] < 0.97
    assert shares[1:] == [0.8, 0.97]
