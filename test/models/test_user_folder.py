"""Folders of this user, where there is no home."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sglang_dllm.user_folder import (
    choose_compiler_folders,
    home_cache,
    temporary_folder,
)

SHOW = """
import os
os.environ.pop("SGLANG_CACHE_DIR", None)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/proc/nowhere/.cache/sglang/inductor"
os.environ["TRITON_CACHE_DIR"] = "/of/the/user"
import torch
for name in ("SGLANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    print(os.environ[name])
"""


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert home_cache() is None


def test_compilers_get_folders_where_there_is_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is told of it while it is imported, which SGLang's first lines do."""
    found = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, "HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert found.stdout.split() == [
        str(temporary_folder() / "sglang"),
        str(temporary_folder() / "sglang/inductor"),
        "/of/the/user",
    ]


def test_a_home_keeps_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    choose_compiler_folders()
    assert dict(os.environ) == before


def test_a_temporary_folder_is_this_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = temporary_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert temporary_folder() == folder
    # Another user could have made it, to plant files.
    folder.chmod(0o777)
    other = temporary_folder()
    assert other != folder
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert temporary_folder() not in (folder, tmp_path)
