"""The Triton kernel equals the oracle, and compiles for GPUs.

Without a GPU the kernel runs in Triton's interpreter, which must be chosen before
Triton is imported: one other process (this file as a script) computes all cases.
``test_base.py`` has the tests that all backends share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton

from helpers.attention_batches import (
    WINDOWS,
    Batch,
    expected,
    plan_of,
    pool_size,
    random_batch,
)
from sglang_dllm.attention.triton import TritonCanvasAttention
from sglang_dllm.kernels import canvas_attention as kernel_module
from sglang_dllm.kernels.canvas_attention import blocks


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
    attention = TritonCanvasAttention(device)
    attention.plan(batch.plan)
    out = attention.run(batch.q, batch.k, batch.v, batch.layer_pool, batch.scale)
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


if __name__ == "__main__":
    torch.save([answers(case, "cpu") for case in CASES], sys.argv[1])
