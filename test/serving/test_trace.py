"""Traces on the disk, and ``python -m sglang_dllm replay``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_dllm import replay as module
from sglang_dllm.__main__ import main
from sglang_dllm.replay import replay
from sglang_dllm.trace import TraceError, canvases, load_trace

TRACE: dict[str, Any] = {
    "format": "sglang-dllm-trace",
    "version": 1,
    "dllm": {"algorithm": "LLaDA"},
    "prompt_len": 3,
    "answer_len": 5,
    "pinned": [[4, 9, "!"]],
    "steps": [
        {"forward": 1, "committed": [[1, 7, " b", 0.75], [0, 8, "a", 1.0]]},
        {"forward": 2, "committed": [[2, 5, "\n", 0.5]], "taken_back": [1]},
        {"forward": 2, "committed": [], "resized": [3, 1, 2]},
        {"forward": 3, "committed": [[1, 7, "\x1b[2J", 0.9], [3, 6, None, None]]},
    ],
}
LINES = """\
forward 0: 0 committed, 4 masks left
░░░░!
forward 1: 2 committed, 2 masks left
a b░░!
forward 2: 1 committed, 2 masks left
a░↵░!
forward 2: resized to 6 positions, 3 masks left
a░↵░░!
forward 3: 2 committed, 1 masks left
a�[2J↵⟨6⟩░!

LLaDA: 3 forwards, 4 tokens (1.33 a forward), 1 filled by a rule
"""


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "trace.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    "content",
    [
        TRACE,
        {"choices": [], "dllm": {"trace": TRACE}},
        {"text": "a", "meta_info": {"dllm": {"trace": TRACE}}},
        {**TRACE, "page": {"text": "a"}, "later": 1},
    ],
)
def test_it_prints_plain_lines(tmp_path: Path, content: Any) -> None:
    out = io.StringIO()
    assert replay(written(tmp_path, content), out, speed=1, by_key=False) == 0
    assert out.getvalue() == LINES


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colors_at_the_speed_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    out = Terminal()
    assert replay(written(tmp_path, TRACE), out, speed=4, by_key=False) == 0
    assert slept == [0.25] * 4
    frames = out.getvalue().split("\x1b[2J\x1b[H")[1:]
    assert len(frames) == 5
    assert "\x1b[30;42m b\x1b[0m" in frames[1], "what is new stands out"
    assert frames[2].count("\x1b[30;42m") == 1
    # The text of a token cannot steer the terminal.
    assert frames[4].count("\x1b[2J") == 0 and "�[2J" in frames[4]


def test_step_waits_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presses = iter([""] * 2)

    def press() -> str:
        try:
            return next(presses)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", press)
    out = io.StringIO()
    assert replay(written(tmp_path, TRACE), out, speed=1, by_key=True) == 130
    assert out.getvalue().count("forward") == 3


def changed(**fields: Any) -> dict[str, Any]:
    return {**TRACE, **fields}


def step(**fields: Any) -> dict[str, Any]:
    return changed(steps=[{"forward": 1, "committed": [], **fields}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no JSON"),
        ("[1, 2]", "no trace"),
        ({"steps": []}, "no trace"),
        (changed(format="another"), "no trace"),
        (changed(version=2), "version"),
        (changed(answer_len=-1), "answer_len"),
        (changed(answer_len=1 << 40), "answer_len"),
        (changed(steps=None), "steps"),
        (step(committed=[[0]]), "steps.0.committed.0"),
        (step(committed=[[0, 1, "a", 2.0]]), "steps.0.committed.0"),
        (step(committed=[[5, 1, "a", 0.5]]), "position 5"),
        (step(taken_back=[9]), "position 9"),
        (step(resized=[4, 2, 0]), "no place 4"),
        (step(resized=[0, 0, 1 << 40]), "no place 0"),
        (changed(pinned=[[7, 1, "a"]]), "position 7"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, says: str
) -> None:
    file = written(tmp_path, content)
    with pytest.raises(TraceError):
        canvases(load_trace(file))
    assert main(["replay", str(file)]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("replay: ") and says in told.err


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sglang_dllm", "replay"]
    found = subprocess.run(
        [*command, str(written(tmp_path, TRACE))], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, LINES, "")
    missing = subprocess.run(
        [*command, str(tmp_path / "none.json")], capture_output=True, text=True
    )
    assert missing.returncode == 1 and "No such file" in missing.stderr
    slow = subprocess.run(
        [*command, "x", "--speed", "0"], capture_output=True, text=True
    )
    assert slow.returncode == 2 and "a number above 0" in slow.stderr
