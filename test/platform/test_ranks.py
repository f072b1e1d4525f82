"""The environment of several ranks on a CPU."""

from __future__ import annotations

import os
from inspect import signature
from types import SimpleNamespace

import pytest
from sglang.srt.utils.numa_utils import init_threads_binding

from sglang_dllm.platform import ranks
from sglang_dllm.platform.ranks import RankBinding, end_without_core_dump
from sglang_dllm.upstream.compat import num_thread_bindings

VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"


@pytest.fixture(autouse=True)
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(6)))


def launch(tp_size: int, dp_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(tp_size=tp_size, dp_size=dp_size)


@pytest.mark.parametrize(
    ("tp_size", "cores"),
    [
        (2, "0,1,2|3,4,5"),
        (4, "0|1,2|3|4,5"),
        (8, "0|0|1|2|3|3|4|5"),
    ],
)
def test_each_rank_gets_its_share_of_the_cores(tp_size: int, cores: str) -> None:
    RankBinding().set_for(launch(tp_size))
    assert os.environ[VARIABLE] == cores


def test_one_rank_needs_none() -> None:
    RankBinding().set_for(launch(1))
    assert VARIABLE not in os.environ


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0|5")
    RankBinding().set_for(launch(2))
    assert os.environ[VARIABLE] == "0|5"


def test_a_second_launch_of_a_process_has_its_own_number() -> None:
    binding = RankBinding()
    for tp_size in (2, 3, 1, 2):
        binding.set_for(launch(tp_size))
        assert os.environ.get(VARIABLE, "").count("|") == tp_size - 1


def test_data_parallel_ranks_count_where_sglang_counts_them() -> None:
    counts_all = "world_size" in signature(init_threads_binding).parameters
    assert num_thread_bindings(launch(2, 3)) == (6 if counts_all else 2)
    assert num_thread_bindings(launch(1)) == 1


def test_no_core_dump_of_cuda_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
    monkeypatch.delenv(name, raising=False)
    end_without_core_dump()
    assert os.environ[name] == "false"
    monkeypatch.setenv(name, "true")
    end_without_core_dump()
    assert os.environ[name] == "true"
