"""A detokenizer whose launching process is killed while it imports SGLang."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from helpers.warm_start import Fork

LAUNCH = """
import multiprocessing, os, signal, time
from sglang.srt.managers import detokenizer_manager
from sglang_dllm.launching.detokenizer import run_detokenizer

def detokenize(server_args, port_args):
    print("runs with", server_args, port_args, flush=True)

def process():
    # It imports SGLang in these seconds.
    while IS_KILLED and os.getppid() == launching:
        time.sleep(0.01)
    detokenizer_manager.run_detokenizer_process = detokenize
    run_detokenizer("flags", "ports")

launching = os.getpid()
started = multiprocessing.get_context("fork").Process(target=process)
started.start()
print(started.pid, flush=True)
if IS_KILLED:
    os.kill(launching, signal.SIGKILL)
started.join()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_it_runs_where_its_parent_lives(is_killed: bool, tmp_path: Path) -> None:
    output = tmp_path / "output"
    launching = Fork(["-c", f"IS_KILLED = {is_killed}\n{LAUNCH}"], output)
    assert launching.wait(60) == (-signal.SIGKILL if is_killed else 0)
    # Both processes write there, in any order.
    (pid,) = re.findall(r"^\d+$", output.read_text(), re.MULTILINE)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ("runs with flags ports" in output.read_text()) is not is_killed
