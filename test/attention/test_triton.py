"""Triton canvas attention equals the oracle.

Without a GPU the kernel runs in Triton's interpreter, which must be chosen before
Triton is imported: one other process (this file as a script) answers all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from helpers.attention_batches import (
    WINDOWS,
    Batch,
    expected,
    plain_canvas_attention,
    plan_of,
    pool_size,
    random_batch,
)
from sglang_dllm.attention import triton as planned_module
from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.triton import TritonCanvasAttention
from sglang_dllm.kernels import canvas_attention as kernel_module
from sglang_dllm.kernels.canvas_attention import blocks

MAX_LEN = 160


@dataclass(frozen=True)
class Case:
    """A batch by name; heads of queries and of keys."""

    name: str
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype | None = None

    def batch(self) -> Batch:
        windows = WINDOWS[self.name]
        return random_batch(
            *(plan_of(windows), pool_size(windows), self.heads, self.head_dim),
            *(self.dtype, self.pool_dtype),
        )

    @property
    def atol(self) -> float:
        return 1e-5 if self.dtype == torch.float32 else 1e-2


CASES = [
    *(Case(name) for name in WINDOWS),
    *(Case("interleaved", heads) for heads in [(3, 3), (7, 1), (14, 2)]),
    *(Case("interleaved", (2, 1), head_dim) for head_dim in (32, 64, 128, 256)),
    Case("interleaved", dtype=torch.float16),
    Case("as long as 140", (2, 1), 32, torch.float16),
    Case("interleaved", dtype=torch.float32, pool_dtype=torch.float16),
]
# Triton's interpreter multiplies the bits of bf16 as integers.
GPU_CASES = [
    *CASES,
    *(Case(name, (28, 4), 128, torch.bfloat16) for name in WINDOWS),
    Case("interleaved", (8, 8), 256, torch.bfloat16),
    Case("interleaved", (8, 8), 128, torch.bfloat16, torch.float8_e4m3fn),
]


def answers(case: Case, device: str) -> list[torch.Tensor]:
    """The output, and the pools after it."""
    batch = case.batch().to(device)
    attention = TritonCanvasAttention(device, MAX_LEN)
    attention.plan(batch.plan)
    out = attention.run(batch.q, batch.k, batch.v, *batch.pools, batch.scale)
    return [x.cpu() for x in (out, *batch.pools)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[list[torch.Tensor]]:
    path = tmp_path_factory.mktemp("attention") / "answers.pt"
    helpers = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def agrees(case: Case, said: list[torch.Tensor]) -> None:
    out, *pools = said
    wanted, *wanted_pools = expected(case.batch())
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.float(), wanted, atol=case.atol, rtol=case.atol)
    for pool, wanted_pool in zip(pools, wanted_pools, strict=True):
        assert torch.equal(pool, wanted_pool)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(c) for c in CASES])
def test_the_interpreted_kernel_equals_the_oracle(
    index: int, interpreted: list[list[torch.Tensor]]
) -> None:
    agrees(CASES[index], interpreted[index])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The kernel in torch; returns the arguments of every launch."""
    launches: list[tuple] = []

    def launch(*args: Any) -> torch.Tensor:
        launches.append(args)
        return plain_canvas_attention(*args)

    monkeypatch.setattr(planned_module, "triton_canvas_attention", launch)
    return launches


@pytest.mark.parametrize("name", WINDOWS)
def test_the_plain_kernel_of_these_tests_equals_the_oracle(
    name: str, plain: list[tuple]
) -> None:
    agrees(Case(name), answers(Case(name), "cpu"))


def test_the_same_rows_are_planned_once(plain: list[tuple]) -> None:
    batch = Case("interleaved").batch()
    attention = TritonCanvasAttention("cpu", MAX_LEN)
    rows = batch.plan.windows
    same = AttentionPlan([replace(row) for row in rows], batch.plan.logits_indices)
    moved = AttentionPlan(
        [
            r if r.is_full else replace(r, start=r.start - 1, end=r.end - 1)
            for r in rows
        ],
        batch.plan.logits_indices,
    )
    for plan in (batch.plan, same, moved):
        own = replace(batch.copy(), plan=plan)
        attention.plan(plan)
        out = attention.run(own.q, own.k, own.v, *own.pools, own.scale)
        torch.testing.assert_close(out, expected(replace(batch, plan=plan))[0])
    tables = [launch[5] for launch in plain]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]


def graph_windows(*canvas_lens: int) -> list[tuple]:
    starts = [min(n // 3, n - 4) for n in canvas_lens]
    return [(i, i + 4, n, True) for i, n in zip(starts, canvas_lens, strict=True)]


def test_a_graph_is_replayed_for_other_canvases(plain: list[tuple]) -> None:
    """The buffers of the capture hold the next plan; others do not touch them."""
    attention = TritonCanvasAttention("cpu", MAX_LEN)
    static = random_batch(plan_of(graph_windows(9, 40, 12)), 200, (4, 2))
    writes = []

    def write(slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        writes.append((slots, k, v))
        static.k_pool[slots], static.v_pool[slots] = k, v

    attention.plan(static.plan, graph=True)
    attention.run(
        static.q, static.k, static.v, *static.pools, static.scale, write=write
    )
    (captured,) = plain
    for seed, lens in enumerate([(70, 5, 33), (4, 4, 4), (20, 20, 150)]):
        batch = random_batch(
            plan_of(graph_windows(*lens), seed + 1), 200, (4, 2), seed=seed + 1
        )
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(static, name).copy_(getattr(batch, name))
        attention.plan(plan_of(WINDOWS["interleaved"]))
        attention.plan(batch.plan, graph=True)
        attention.plan(plan_of(graph_windows(30, 31)), graph=True)
        ((slots, k, v),) = writes
        static.k_pool[slots], static.v_pool[slots] = k, v
        out = plain_canvas_attention(*captured)
        wanted, *pools = expected(batch)
        torch.testing.assert_close(out, wanted)
        assert torch.equal(static.k_pool, pools[0])
        assert torch.equal(static.v_pool, pools[1])


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([(0, 4, 9, True), (0, 5, 9, True)], "one length"),
        ([(0, 4, 9, True), (0, 4, 4, False)], "a window needs"),
        ([(0, 4, MAX_LEN + 1, True)], "more than 160"),
    ],
)
def test_a_graph_refuses_other_rows(windows: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TritonCanvasAttention("cpu", MAX_LEN).plan(plan_of(windows), graph=True)


@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        (Case("windows", head_dim=24), ValueError, "heads of 24"),
        (Case("windows", head_dim=512), ValueError, "heads of 512"),
        (Case("windows", dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_impossible_arguments_are_refused(
    case: Case, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        answers(case, "cpu")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "pool", "num_queries"),
    [
        (128, "bf16", "bf16", 4096),
        (128, "bf16", "bf16", 32),
        (128, "bf16", "fp8e4nv", 224),
        (256, "fp16", "fp16", 4096),
        (64, "fp32", "fp32", 4096),
    ],
)
def test_the_kernel_compiles_for_datacenter_gpus(
    capability: int,
    head_dim: int,
    dtype: str,
    pool: str,
    num_queries: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to machine code, which needs no GPU, within any GPU's shared memory."""
    kernel = kernel_module._canvas_kernel
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("Triton was imported as an interpreter")
    if pool == "fp8e4nv" and capability < 89:
        pytest.skip("this GPU has no such fp8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = blocks(head_dim, 4 if dtype == "fp32" else 2, num_queries)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GROUP": 7, "HEAD_DIM": head_dim, **sizes}
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    pointers |= dict.fromkeys(("k_pool", "v_pool"), f"*{pool}")
    pointers |= dict.fromkeys(("table", "slots"), "*i32")
    pointers |= dict.fromkeys(("scale", "k_scale", "v_scale"), "fp32")
    types = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    # As Triton finds at a launch: aligned tensors, strides of whole heads.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name] not in ("constexpr", "fp32")
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, types, constants, aligned),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options=options,
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_kernel_on_a_gpu_equals_the_oracle(case: Case) -> None:
    agrees(case, answers(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)], ids=["llada", "dream"])
def test_the_kernel_on_a_gpu_in_a_graph(heads: tuple[int, int]) -> None:
    def batch_of(seed: int, *lens: int) -> Batch:
        plan = plan_of(graph_windows(*lens), seed)
        made = random_batch(plan, 300, heads, 128, torch.bfloat16, seed=seed)
        return made.to("cuda")

    static = batch_of(0, 100, 100, 60)
    attention = TritonCanvasAttention("cuda", MAX_LEN)

    def forward() -> torch.Tensor:
        return attention.run(static.q, static.k, static.v, *static.pools, static.scale)

    attention.plan(static.plan, graph=True)
    forward()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for seed, lens in enumerate([(70, 5, 33), (4, 4, 4), (20, 20, 150)]):
        batch = batch_of(seed + 1, *lens)
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(static, name).copy_(getattr(batch, name))
        attention.plan(batch.plan, graph=True)
        graph.replay()
        wanted, *pools = expected(batch.to("cpu"))
        torch.testing.assert_close(out.float().cpu(), wanted, atol=1e-2, rtol=1e-2)
        assert torch.equal(static.k_pool.cpu(), pools[0])
        assert torch.equal(static.v_pool.cpu(), pools[1])


if __name__ == "__main__":
    torch.save([answers(case, "cpu") for case in CASES], sys.argv[1])
