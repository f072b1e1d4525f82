"""Row statistics: the plain form by a naive formula, the kernels by the plain form.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before
Triton is imported: one other process (this file as a script) answers all cases.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from sglang_dllm.kernels import row_statistics as module
from sglang_dllm.kernels.row_statistics import (
    RowStatistics,
    Want,
    plain_row_statistics,
    row_statistics,
    triton_row_statistics,
)

INF = math.inf
EPS = 1e-10
ALL = Want.PROBABILITY | Want.MARGIN | Want.NEGATIVE_ENTROPY
MEASURES = ("probability", "margin", "negative_entropy")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PART = module._SPLIT


@dataclass(frozen=True)
class Case:
    """Arguments of ``row_statistics``; ``logits`` is on the CPU."""

    logits: torch.Tensor
    mask_id: int
    want: Want = ALL


def random_logits(
    num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, scale: float = 4
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).to(dtype)


def with_entries(
    num_rows: int, vocab_size: int, *entries: tuple[int, int | slice, float]
) -> torch.Tensor:
    logits = random_logits(num_rows, vocab_size)
    for row, column, value in entries:
        logits[row, column] = value
    return logits


def likeliest_mask(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    """The mask token is the best of the even rows."""
    logits[::2, mask_id] = logits.max().item() + 1
    return logits


def _cases() -> dict[str, Case]:
    cases = {
        f"{str(dtype).removeprefix('torch.')}-{size}": Case(
            likeliest_mask(random_logits(5, size, dtype), size - 2), size - 2
        )
        for dtype in DTYPES
        for size in (11, 128, 1000, PART + 3)
    }
    for want in (Want(0), *Want, Want.PROBABILITY | Want.NEGATIVE_ENTROPY):
        logits = likeliest_mask(random_logits(3, PART + 3), 7)
        cases[f"only {want.name}"] = Case(logits, 7, want)
    far = PART + 2
    # Greatest logits: within a part, across parts, at both ends, with the mask first.
    ties = with_entries(
        *(6, PART + 3),
        *((0, 30, 50.0), (0, 900, 50.0), (1, 40, 50.0), (1, far, 50.0)),
        *((2, 0, 50.0), (2, far, 50.0), (3, 5, 50.0), (3, 6, 50.0), (3, 7, 50.0)),
        *((4, slice(None), 1.5), (5, far - 1, 50.0), (5, far, 50.0)),
    )
    cases["ties"] = Case(ties, 5)
    cases["ties, bf16"] = Case(random_logits(8, 2 * PART, torch.bfloat16, 0.1), 5)
    cases["zeros of both signs"] = Case(
        torch.tensor([[-1.0, -0.0, 0.0, -2.0], [0.0, 0.0, -0.0, 9.0]]), 0
    )
    cases["NaN"] = Case(
        with_entries(5, PART + 3, (0, 17, math.nan), (1, far, math.nan),
                     (2, 9, math.nan), (4, slice(None), math.nan)), 9
    )  # fmt: skip
    cases["+inf"] = Case(with_entries(3, PART + 3, (0, 17, INF), (1, 9, INF)), 9)
    cases["-inf"] = Case(
        with_entries(
            *(8, PART + 3),
            *((0, slice(3, 900), -INF), (1, slice(0, PART), -INF)),
            *((2, slice(PART, None), -INF), (3, slice(None), -INF), (3, far, 2.0)),
            *((4, slice(None), -INF), (5, slice(None), -INF), (5, 0, 2.0)),
            *((6, slice(None), -INF), (6, 1, 2.0), (7, 0, -INF)),
        ),
        0,
    )
    cases["only the mask token after the first part"] = Case(
        random_logits(3, PART + 1), PART
    )
    cases["saturated"] = Case(
        with_entries(
            *(5, 1000),
            *((0, 3, 200.0), (1, 3, 3e38), (2, 3, -3e38), (3, 999, 200.0)),
            *((4, slice(None), -700.0), (4, 8, 0.0)),
        ),
        999,
    )
    tiny = with_entries(2, 11, (0, slice(None), 0.0), (0, 4, 1e-40), (0, 6, 2e-40))
    cases["subnormal"] = Case(tiny, 0)
    cases["rows apart"] = Case(random_logits(4, PART + 64)[:, 5 : PART + 8], 9)
    cases["every third row"] = Case(random_logits(9, 1000)[::3], 9)
    cases["columns apart"] = Case(random_logits(1000, 4).T, 9)
    cases["one row repeated"] = Case(random_logits(1, 1000).expand(3, -1), 9)
    cases["two ids"] = Case(torch.tensor([[1.0, 2.0], [-INF, 2.0]]), 1)
    cases["no rows"] = Case(torch.empty(0, 1000), 9)
    return cases


CASES = _cases()


def answers(names: dict[str, Case], device: str) -> dict[str, dict]:
    """The results of the kernels for each case, as plain containers of CPU tensors."""
    said = {}
    for name, case in names.items():
        logits = case.logits if device == "cpu" else case.logits.to(device)
        found = triton_row_statistics(logits, case.mask_id, EPS, case.want)
        said[name] = {
            field: None if value is None else value.cpu()
            for field, value in vars(found).items()
        }
    return said


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("kernels") / "answers.pt"
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def agrees(case: Case, said: dict, rtol: float = 2e-14, atol: float = 1e-15) -> None:
    expected = plain_row_statistics(case.logits, case.mask_id, EPS, case.want)
    broken = ~case.logits.double().softmax(dim=-1).isfinite().all(dim=-1)
    with_nan = case.logits.isnan().any(dim=-1)
    assert said["tokens"].dtype == torch.int64
    assert torch.equal(said["tokens"][~with_nan], expected.tokens[~with_nan])
    assert (said["tokens"] != case.mask_id).all()
    assert ((said["tokens"] >= 0) & (said["tokens"] < case.logits.shape[1])).all()
    for name in MEASURES:
        wanted, value = getattr(expected, name), said[name]
        assert (value is None) == (wanted is None)
        if wanted is not None:
            assert value.dtype == torch.float64
            assert value[broken].eq(-INF).all()
            # Margins and entropies near 0 are differences of numbers near 1.
            torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_agree_with_the_plain_form(
    name: str, interpreted: dict[str, dict]
) -> None:
    agrees(CASES[name], interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_plain_form_is_the_naive_formula(name: str) -> None:
    case = CASES[name]
    logits, mask_id = case.logits.double(), case.mask_id
    found = plain_row_statistics(case.logits, mask_id, EPS, case.want)
    for row, values in enumerate(logits):
        token = int(found.tokens[row])
        ids = [i for i in range(len(values)) if i != mask_id]
        p = values.softmax(dim=0)
        if not values.isnan().any():
            row_values = values.tolist()
            assert token == max(ids, key=row_values.__getitem__)
        two = [*sorted(p[ids].tolist(), reverse=True)[:2], 0.0]
        naive = {
            "probability": float(p[token]),
            "margin": two[0] - two[1],
            "negative_entropy": float((p * (p + EPS).log()).sum()),
        }
        for measure, expected in naive.items():
            value = getattr(found, measure)
            if value is None:
                assert Want[measure.upper()] not in case.want
            elif p.isnan().any():
                assert value[row] == -INF
            else:
                assert float(value[row]) == pytest.approx(expected, 1e-14, 1e-15)


def test_plain_form_has_the_same_answer_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = random_logits(10, 1000)
    for want in (ALL, Want.MARGIN):
        whole = plain_row_statistics(logits, 9, EPS, want)
        monkeypatch.setattr(module, "_PLAIN_ELEMENTS", 3500)
        for name, value in vars(plain_row_statistics(logits, 9, EPS, want)).items():
            same = getattr(whole, name)
            assert (value is None and same is None) or torch.equal(value, same)
        monkeypatch.undo()


def test_logits_on_a_cpu_take_the_plain_form_and_stay_as_they_were() -> None:
    logits = random_logits(4, 100)
    before = logits.clone()
    found = row_statistics(logits, 9, EPS, ALL)
    assert torch.equal(logits, before)
    assert found.margin is not None
    assert found.negative_entropy is not None
    assert found.margin.isfinite().all()


@pytest.mark.parametrize("compute", [plain_row_statistics, triton_row_statistics])
def test_impossible_arguments_are_refused(
    compute: Callable[..., RowStatistics],
) -> None:
    logits = random_logits(2, 10)
    for wrong in (logits[0], logits[:, :1]):
        with pytest.raises(ValueError, match="must be"):
            compute(wrong, 0, EPS, ALL)
    for mask_id in (-1, 10):
        with pytest.raises(ValueError, match="mask_id"):
            compute(logits, mask_id, EPS, ALL)
    with pytest.raises(ValueError, match="eps"):
        compute(logits, 0, 0.0, ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_that_no_kernel_takes_go_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Guidance and credit make float64 logits, on a GPU as well."""
    for way in ("triton", "plain"):
        name = f"sglang_dllm.kernels.row_statistics.{way}_row_statistics"
        monkeypatch.setattr(name, lambda *args, way=way: way)
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=dtype)
    found: Any = row_statistics(on_gpu, 0, EPS, ALL)
    assert found == ("plain" if dtype == torch.float64 else "triton")


def test_kernels_refuse_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        triton_row_statistics(random_logits(2, 10, torch.float64), 0, EPS, ALL)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_datacenter_gpus(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU; the interpreter checks no types."""
    if not isinstance(module._split_kernel, triton.JITFunction):
        pytest.skip("Triton was imported as an interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {
        "logits": "*bf16", "extrema": "*fp32", "first": "*i32", "totals": "*fp64",
        "tokens": "*i64", "probability": "*fp64", "margin": "*fp64",
        "softmax": "*fp64", "parts": "*fp64",
    }  # fmt: skip
    for kernel, constants in (
        (module._split_kernel, {"NUM_SPLITS": 38, "SPLIT": PART, "MARGIN": True}),
        (module._combine_kernel, {"NUM_SPLITS": 38, "PADDED": 64}),
        (module._entropy_kernel, {"NUM_SPLITS": 38, "SPLIT": PART, "EPS": EPS}),
    ):
        types = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in kernel.arg_names
        }
        compiled = triton.compile(
            triton.compiler.ASTSource(kernel, types, constants),
            target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
            options={"num_warps": 8},
        )
        assert compiled.asm["cubin"]
        if "EPS" in constants:  # whole, not rounded to fp32
            assert "0d3DDB7CDFD9D7BDBB" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_agree_with_the_plain_form(name: str) -> None:
    agrees(CASES[name], answers({name: CASES[name]}, "cuda")[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_at_full_size_in_any_batch_and_in_a_graph(dtype: torch.dtype) -> None:
    case = Case(random_logits(64, 151_936, dtype), 151_666)
    logits = case.logits.cuda()
    found = row_statistics(logits, case.mask_id, EPS, ALL)
    # The plain form's long sums are the less exact of the two.
    said = {name: value.cpu() for name, value in vars(found).items()}
    agrees(case, said, rtol=1e-13, atol=1e-14)
    alone = row_statistics(logits[7:8], case.mask_id, EPS, ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = row_statistics(logits, case.mask_id, EPS, ALL)
    for _ in range(2):
        graph.replay()
    for name, value in vars(found).items():
        assert torch.equal(getattr(alone, name), value[7:8])
        assert torch.equal(getattr(captured, name), value)


if __name__ == "__main__":
    torch.save(answers(CASES, "cpu"), sys.argv[1])
