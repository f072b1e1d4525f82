"""The GPU benchmark's arithmetic: floors, steps, traces, tables; no server, no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmark.dummy_checkpoint import MIN_VOCAB_SIZE
from benchmark.gpu import __main__ as command
from benchmark.gpu import machine, steps, traces
from benchmark.gpu.report import GOALS, Results, judge, markdown, table
from benchmark.gpu.roofline import (
    LLADA_8B,
    ModelShape,
    Rates,
    Work,
    attention_floor,
    forward_floor,
    head_floor,
    median_of,
    step_times,
    tokens_per_second,
)
from benchmark.gpu.shapes import (
    FULL_512,
    WINDOW_64,
    Case,
    cpu_shape,
    cpu_sizes,
    gpu_shape,
    gpu_sizes,
    write_model,
)

H200 = Rates(bandwidth=4.8e12, matrix_rate=790e12)
DREAM_7B = ModelShape(28, 3584, 28, 4, 18944, 152064, 2)

# Milliseconds of compute and of memory, and TPS at TPF 9.9 and 4.9, worked out by hand
# from the published sizes before this code was written.
FLOORS = [
    (LLADA_8B, Work(512, 512, 512), 9.89, 3.23, 1001, 495),
    (LLADA_8B, Work(512, 512, 64), 9.30, 3.19, 1064, 527),
    (LLADA_8B, Work(384, 384, 384), 7.39, 3.21, 1340, 663),
    (LLADA_8B, Work(32, 512, 32), 0.62, 3.18, 3110, 1539),
    (LLADA_8B, Work(64, 512, 64), 1.24, 3.19, 3107, 1538),
    (LLADA_8B, Work(128, 512, 128), 2.47, 3.19, 3100, 1534),
    (LLADA_8B, Work(32, 4096, 32), 0.69, 3.57, 2770, 1371),
    (DREAM_7B, Work(512, 512, 512), 9.30, 3.02, 1065, 527),
    (DREAM_7B, Work(128, 512, 128), 2.32, 2.97, 3335, 1651),
]


@pytest.mark.parametrize(("shape", "work", "compute", "memory", "tps", "less"), FLOORS)
def test_floor_of_an_h200(
    shape: ModelShape, work: Work, compute: float, memory: float, tps: int, less: int
) -> None:
    floor = forward_floor(shape, work, H200)
    assert floor.compute_ms == pytest.approx(compute, abs=0.006)
    assert floor.memory_ms == pytest.approx(memory, abs=0.006)
    assert floor.ms == max(floor.compute_ms, floor.memory_ms)
    assert tokens_per_second(floor.ms, 9.9, 1) == pytest.approx(tps, rel=1e-3)
    assert tokens_per_second(floor.ms, 4.9, 1) == pytest.approx(less, rel=1e-3)


def test_a_batch_reads_the_weights_once() -> None:
    one = forward_floor(LLADA_8B, Work(64, 512, 64), H200)
    many = forward_floor(LLADA_8B, Work(64, 512, 64, 16), H200)
    weights = (LLADA_8B.block_params + LLADA_8B.head_params) * 2 / 4.8e12 * 1e3
    assert many.compute_ms == pytest.approx(16 * one.compute_ms)
    assert many.memory_ms - weights == pytest.approx(16 * (one.memory_ms - weights))


def test_sizes_of_llada_8b() -> None:
    assert LLADA_8B.block_params == pytest.approx(6.979e9, rel=1e-4)
    assert LLADA_8B.head_params == pytest.approx(0.518e9, rel=1e-3)
    assert LLADA_8B.kv_bytes == 512 * 1024
    assert DREAM_7B.kv_bytes == 56 * 1024


def test_floor_of_parts() -> None:
    # 4 * 4096 * 64 * 512 operations; 512 tokens of 16 KiB and twice 64 rows of 8 KiB.
    attention = attention_floor(LLADA_8B, Work(64, 512, 0), H200)
    assert attention.compute_ms == pytest.approx(5.369e8 / 790e12 * 1e3, rel=1e-3)
    assert attention.memory_ms == pytest.approx(9.437e6 / 4.8e12 * 1e3, rel=1e-3)
    head = head_floor(LLADA_8B, 64, H200)
    assert head.compute_ms == pytest.approx(64 * 1.036e9 / 790e12 * 1e3, rel=1e-3)
    assert head.memory_ms == pytest.approx(1.0527e9 / 4.8e12 * 1e3, rel=1e-3)


def test_a_step_is_what_the_longer_run_takes_more() -> None:
    times = step_times([0.5, 0.6], [0.7, 1.0], short=8, long=28)
    assert times == pytest.approx([10.0, 20.0])
    with pytest.raises(ValueError, match="8 forwards"):
        step_times([1.0], [1.0], short=8, long=8)


def test_no_median_of_fewer_than_five() -> None:
    assert median_of([5, 1, 4, 2, 3]) == 3
    with pytest.raises(ValueError, match="at least 5"):
        median_of([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("case", [*gpu_sizes(False), *cpu_sizes(False)])
def test_both_runs_of_a_case_are_whole_rounds_within_its_answer(case: Case) -> None:
    short, longest = case.forwards
    assert short % 4 == longest % 4 == 0
    assert 4 <= short < longest < case.answer_len < case.context
    for budget in (0.001, 1.0, 1000.0):
        plan = steps.Plan.within(case, 0.01, budget)
        assert plan.short == short < plan.long <= longest
        assert 5 <= plan.pairs <= 15


def test_a_plan_takes_more_forwards_before_more_pairs() -> None:
    plan = steps.Plan.within(Case(128, 512, 1), 0.01, 5 * 0.01 * (8 + 20))
    assert plan == steps.Plan(8, 20, 5)


def test_goals_come_first_and_a_quick_run_has_no_more() -> None:
    full, quick = list(gpu_sizes(False)), list(gpu_sizes(True))
    assert full[: len(quick)] == quick
    assert len(full) == len(set(full)) == 18
    assert {goal.line for goal in GOALS} == {case.name for case in quick}
    assert gpu_sizes(False).most_tokens == 16 * 1024


def test_logits_of_a_window() -> None:
    # Forwards 9 to 28 look at 56 down to 37 masks.
    assert WINDOW_64.work(8, 28) == Work(64, 512, sum(range(37, 57)) / 20, 1)


def test_a_request_must_run_what_its_case_says() -> None:
    meta = {"num_forwards": 12, "tokens_computed": 2 * 512 + 10 * 64}
    meta["completion_tokens"] = 64
    steps.check_counts(WINDOW_64, 12, meta)
    with pytest.raises(steps.StepError, match="tokens_computed"):
        steps.check_counts(FULL_512, 12, meta)
    with pytest.raises(steps.StepError, match="num_forwards"):
        steps.check_counts(WINDOW_64, 8, meta)


def test_shapes() -> None:
    assert gpu_shape(None, None) == LLADA_8B
    small = gpu_shape(4, 1024)
    assert (small.layers, small.heads, small.ff, small.vocab) == (4, 8, 3072, 126464)
    assert cpu_shape(None, None).dtype_bytes == 4


def test_the_model_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLADA_8B)
    config = json.loads((folder / "config.json").read_text())
    sizes = ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size")
    assert [config[key] for key in sizes] == [32, 4096, 32, 32, 12288]
    assert (config["vocab_size"], config["torch_dtype"]) == (126464, "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == config["mask_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.decode(tokenizer("a 1\n").input_ids) == "a 1\n"
    assert len(tokenizer) == MIN_VOCAB_SIZE <= cpu_shape(3, 32).vocab


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> traces.Event:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


MODEL_CALL = "sglang_dllm/models/dense.py(270): forward"
TRACE = [
    event("python_function", MODEL_CALL, 0, 100),
    event("python_function", "/x/sglang_dllm/models/llada.py(9): logits", 150, 20),
    event("python_function", "sglang_dllm/decoding/decoder.py(9): commit", 140, 60),
    event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 160, 5, correlation=2),
    event("cuda_runtime", "cudaLaunchKernel", 180, 5, correlation=3),
    event("cuda_runtime", "cudaGraphLaunch", 300, 5, correlation=4),
    event("kernel", "gemm", 400, 50, correlation=1),
    event("kernel", "gemm", 450, 30, correlation=2),
    event("kernel", "select", 480, 7, correlation=3),
    event("kernel", "in a graph", 490, 11, correlation=4),
    event("gpu_memcpy", "Memcpy DtoH", 500, 2, correlation=99),
]


def test_a_kernel_is_the_models_if_it_was_launched_there() -> None:
    found = traces.totals(TRACE)
    assert found.model == {"gemm": 80, "in a graph": 11}
    assert found.other == {"select": 7, "Memcpy DtoH": 2}


def test_traces_without_model_or_kernels_are_refused() -> None:
    with pytest.raises(traces.StepError, match="no call"):
        traces.totals(TRACE[2:])
    with pytest.raises(traces.StepError, match="no kernel"):
        traces.totals(TRACE[:7])


def test_the_parts_of_a_step() -> None:
    model = traces.per_forward({"a": 1000.0}, {"a": 9000.0, "b": 400.0}, 4)
    assert model == {"a": 2.0, "b": 0.1}
    row = traces.outside("x", 2.5, model, {"c": 0.15})
    assert row["gaps_ms"] == pytest.approx(0.25)
    assert row["outside"] == pytest.approx(0.16)


def test_spans_without_overlaps() -> None:
    assert traces.merged([(5, 6), (0, 3), (2, 4), (1, 2)]) == [(0, 4), (5, 6)]


def step_row(case: Case, ms: float) -> dict[str, Any]:
    plan = steps.Plan(8, 28, 5)
    return steps.figures(case, plan, [ms] * 5, LLADA_8B, H200)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    facts = {"device": "cuda", "software": {"torch": "2.11.0"}}
    return Results(tmp_path / "gpu.json", facts, has_goals=True)


def test_goals_are_met_missed_or_not_measured(results: Results) -> None:
    results.add("steps", step_row(FULL_512, 11.6))
    results.add("steps", step_row(WINDOW_64, 4.3))
    outside = traces.outside(WINDOW_64.name, 4.3, {"a": 4.2}, {})
    results.add("outside", outside)
    verdicts = {row["goal"]: row["verdict"] for row in results.content["goals"]}
    assert verdicts[FULL_512.name] == "met"
    assert verdicts[WINDOW_64.name] == "missed"
    assert verdicts[f"outside the model's kernels, {WINDOW_64.name}"] == "met"
    assert list(verdicts.values()).count("not measured") == 3
    others = judge(results.content, has_goals=False)
    assert {row["verdict"] for row in others} == {"not measured"}


def test_throughput_goal() -> None:
    content: dict[str, Any] = {"outside": [], "steps": []}
    case = Case(64, 512, 16)
    for ms, verdict in [(26.4, "met"), (26.5, "missed")]:
        content["steps"] = [step_row(case, ms)]
        assert judge(content, True)[2]["verdict"] == verdict


def test_both_files_are_complete_after_each_line(results: Results) -> None:
    results.add("steps", step_row(FULL_512, 12.0))
    results.add("skipped", {"name": "x", "reason": "no time"})
    saved = json.loads(results.out.read_text())
    assert [row["name"] for row in saved["steps"]] == [FULL_512.name]
    text = results.out.with_suffix(".md").read_text()
    assert text == markdown(saved)
    # 46.5 tokens through the head: a floor of 9.28 ms.
    assert "| full canvas 512 batch 1 | 12.000 |" in text
    assert "77 %" in text and " 826 |" in text and "5 x 20" in text
    assert "| x    | no time |" in text and "## Errors" not in text
    assert not list(results.out.parent.glob("*.part"))


def test_table() -> None:
    assert table(["a", "figure"], [["long name", "1"]]).splitlines() == [
        "| a         | figure |",
        "| --------- | -----: |",
        "| long name |      1 |",
    ]


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    args = command.build_parser().parse_args(["--out", "x.json", "--layers", "2"])
    assert (args.out, args.layers, args.minutes) == (Path("x.json"), 2, 8.5)
    with pytest.raises(SystemExit):
        command.build_parser().parse_args([])
    assert "--out" in capsys.readouterr().err


def test_the_log_tells_of_the_graphs() -> None:
    """The two lines are those of ``graph_memory.settle_fraction`` and
    ``graphs.CanvasGraphs.capture_grid``."""
    log = """
        CUDA graphs take about 1400 MiB: --mem-fraction-static is 0.800
        CUDA graphs: 23 forwards and 40 steps captured in 12.5 s and 1301 MiB
    """
    found = [tuple(row.values()) for row in command.start_rows(60, log)]
    assert found == [
        ("server start", 60, "s"),
        ("CUDA graphs, estimated memory", 1400, "MiB"),
        ("CUDA graphs, forwards", 23, ""),
        ("CUDA graphs, steps", 40, ""),
        ("CUDA graphs, capture", 12.5, "s"),
        ("CUDA graphs, memory", 1301, "MiB"),
    ]
    assert [row["name"] for row in command.start_rows(60, "")] == ["server start"]


def test_timing_on_the_cpu() -> None:
    calls: list[int] = []
    assert machine.timed(lambda: calls.append(1), "cpu") >= 0
    assert len(calls) == machine.WARM_UPS + machine.RUNS
