"""Arithmetic and tables of the speed benchmarks; nothing is measured here."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmark import goals
from benchmark.command import BenchmarkError, parser_of, run_command
from benchmark.server import Reply, median_ratio
from benchmark.speed import (
    cache_speed,
    peak_memory,
    round_cost,
    server_bound,
    structure,
)
from benchmark.speed.server_bound import Round, outside_share
from benchmark.subprocess_worker import in_subprocess


def test_a_ratio_is_of_the_same_round() -> None:
    assert median_ratio([2, 4, 30], [1, 2, 10]) == 2


def test_the_bound_by_time_and_by_token() -> None:
    bare = [Round(seconds, seconds, 100, 8) for seconds in (1.0, 2.0, 3.0)]
    ours = [Round(2 * b.seconds, 2.5 * b.cpu_seconds, 200, 8) for b in bare]
    found = server_bound.compare(bare, ours)
    assert found["speed"] == 0.5
    assert found["speed_per_token"] == 1
    # Twice the tokens take twice the model's time: 2 of 2.5.
    assert found["outside_share"] == pytest.approx(0.2)
    assert found["bare_us_per_token"] == pytest.approx(2e4)
    text = server_bound.show(
        {"problems": 16, "packed_forwards": 8, "threads": 1, "rounds": 3, **found}
    )
    assert "bare = 1: 0.50 (per token computed 1.00)" in text
    assert "20.0 %" in text


def test_a_scheduler_that_takes_no_more_than_the_model() -> None:
    assert outside_share(Round(1, 1, 10, 1), Round(1, 1, 10, 1)) == 0


def reply(tokens: int, forwards: int, computed: int, reused: int) -> Reply:
    meta = {"tokens_computed": computed, "tokens_cached": reused, "full_refreshes": 1}
    return Reply([0] * tokens, forwards, 1.0, "", meta)


def test_a_cache_beside_none() -> None:
    base, ours = cache_speed.Pass(), cache_speed.Pass()
    base.add([reply(30, 10, 5120, 0)] * 2, [True, False], 4.0)
    base.add([reply(30, 10, 5120, 0)] * 2, [True, True], 8.0)
    ours.add([reply(30, 12, 1024, 5120)] * 2, [False, True], 1.0)
    ours.add([reply(30, 12, 1024, 5120)] * 2, [True, True], 4.0)
    found = cache_speed.figures_of(ours, base)
    assert found["speed"] == 3  # of 4 and 2
    assert (found["lost"], found["won"]) == (1, 1)
    assert found["accuracy"] == 0.75
    assert found["accuracy_change"] == 0
    assert found["tokens_per_forward"] == 2.5
    assert found["seconds_per_problem"] == 1.25
    table = cache_speed.show(
        {
            "problems": 4,
            "canvas_len": 512,
            "concurrency": 2,
            "algorithm": "EntropyThreshold",
            "caches": {"none": cache_speed.figures_of(base, base), "dual": found},
        }
    )
    dual = next(line for line in table.splitlines() if line.startswith("dual"))
    assert dual.split()[-1] == "3.00"


def test_shares_of_a_round() -> None:
    ms = dict.fromkeys(round_cost.PARTS, 1.0) | {"model": 12.0}
    found = round_cost.shares(ms)
    assert found["outside_share"] == pytest.approx(6 / 19)
    assert found["outside_and_measure_share"] == pytest.approx(5 / 19)


def test_a_round_of_several_forwards_is_shared_out() -> None:
    part = dict.fromkeys(round_cost.PARTS, 0.0)
    rounds = [(part | {"model": 0.004}, 4), (part | {"model": 0.002}, 1)]
    assert round_cost.typical(rounds)["model"] == pytest.approx(1.5)


def test_a_part_inside_another_is_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(round_cost.time, "perf_counter", lambda: now[0])
    clock = round_cost.Clock()

    class Model:
        def outer(self) -> None:
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self) -> None:
            now[0] += 4

    model = Model()
    clock.over(model, "inner", "model")
    clock.over(model, "outer", "runner")
    model.outer()
    now[0] += 8
    found = clock.take()
    assert (found["runner"], found["model"], found["rest"]) == (3, 4, 8)
    assert sum(clock.take().values()) == 0


def figures(**changes: Any) -> dict[str, Any]:
    row = {"speed": 4.0, "accuracy_change": -0.03}
    return {
        "compare_plain_loop": {"server": {"1": {"throughput_ratio": 0.9}}},
        "server_bound": {"speed": 0.95, "speed_per_token": 0.9, "outside_share": 0.1},
        "cache_speed": {
            "problems": 10,
            "caches": {"dual": row, "vicinity": row | {"speed": 2.0}},
        },
        "peak_memory": {"peak": 2**29, "cases": {"Credit": {"peak": 2**29}}},
        "structure": {"forward 1": 1.3, "forward 16": 1.1},
        **changes,
    }


def test_a_form_beside_none() -> None:
    def reply(tokens: int, forwards: int, seconds: float) -> Reply:
        return Reply([0] * tokens, forwards, seconds)

    plain = structure.pass_of([reply(96, 24, 2.4)] * 2, [False, False], 4.8)
    ours = structure.pass_of([reply(80, 10, 1.2), reply(80, 8, 1.2)], [True, True], 2.0)
    mixed = structure.pass_of(
        [reply(80, 10, 3.0), reply(96, 24, 2.64)], [True, False], 3.0
    )
    assert (plain.speed, plain.plain, plain.structured) == (40, 100, 0)
    assert (ours.speed, ours.structured, ours.forwards) == (80, 135, 9)
    passes = {"plain 1": [plain], "structured 1": [ours], "mixed": [mixed]}
    found = structure.figures_of(
        passes | {"plain 16": [plain], "structured 16": [ours]}
    )
    assert (found["speed 1"], found["forward 16"]) == (2, 1.35)
    assert found["forward of others"] == pytest.approx(1.1)
    assert "ratio 1.10" in structure.show(found)


def test_goals_met_and_missed() -> None:
    lines = goals.table(figures()).splitlines()[1:]
    met = [line[55:].split()[0] for line in lines]
    assert met == ["no", "yes", "yes", "yes", "no", "no", "-", "yes", "no", "yes"]
    assert lines[4].endswith("-3.0 (dual, 10 problems)")
    assert lines[7].endswith("0.50 (Credit)")


def test_the_largest_round_counts() -> None:
    kinds = [
        {"canvases": 1, "steps": 1, "outside_share": 0.3},
        {"canvases": 16, "steps": 4, "outside_share": 0.02},
        {"canvases": 16, "steps": 1, "outside_share": 0.05},
    ]
    found = goals.table({"round_cost": {"kinds": kinds}})
    (line,) = (x for x in found.splitlines() if x.startswith("round outside"))
    assert line.split()[-2:] == ["yes", "2.0"]


def test_the_commands_of_make_bench_are_understood() -> None:
    for script, arguments in goals.COMMANDS.items():
        module = importlib.import_module(f"benchmark.speed.{script}")
        module.build_parser().parse_args(arguments)
    assert {goal.script for goal in goals.GOALS} == set(goals.COMMANDS)


def test_a_benchmark_that_failed_is_named() -> None:
    assert goals.problem({"a": None, "b": {}, "c": None}) == "failed: a, c"
    assert goals.problem({"b": {"n": 1}}) is None
    assert " -    -" in goals.show({"round_cost": None})


def test_memory_by_stage() -> None:
    watch = peak_memory.Watch()
    owner = argparse.Namespace(work=lambda: bytearray(64 * peak_memory.MIB) and None)
    watch.over(owner, "work", "head")
    try:
        watch.note()
    except OSError as error:
        pytest.skip(f"/proc: {error}")
    before = peak_memory.status("VmRSS")
    owner.work()
    assert watch.peaks["head"] - before > 60 * peak_memory.MIB
    watch.peaks["other"] = 0
    watch.note()
    assert watch.peaks["other"] - before < 30 * peak_memory.MIB


def test_a_failure_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(args: argparse.Namespace) -> dict[str, Any]:
        raise BenchmarkError("first\nlast")

    parser = parser_of("A test.")
    parser.prog = "x.py"
    assert run_command(parser, fails, str, arguments=[]) == 1
    assert capsys.readouterr().err == "x.py: last\n"
    out = tmp_path / "out.json"
    arguments = ["--json", str(out)]
    wrong = run_command(parser, lambda a: {"n": 1}, str, lambda f: "bad", arguments)
    assert wrong == 1 and out.exists()
    assert capsys.readouterr().err == "x.py: bad\n"


def test_an_object_in_a_process_of_its_own() -> None:
    with in_subprocess("fractions:Fraction", 1, 3) as call:
        assert call("limit_denominator", 2) == 1 / 2
        with pytest.raises(BenchmarkError, match="ZeroDivisionError"):
            call("__truediv__", 0)
