"""Folders of this user, where there is no home."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from sglang_dllm.user_folder import (
    choose_compiler_folder,
    home_cache,
    temporary_folder,
)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert home_cache() is None


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_flashinfer_gets_a_folder_where_there_is_no_home(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Set and removed, so that the variable is as before after this test.
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "")
    monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE")
    monkeypatch.setenv("HOME", home or str(tmp_path / "home"))
    choose_compiler_folder()
    chosen = os.environ.get("FLASHINFER_WORKSPACE_BASE")
    assert chosen == (str(temporary_folder()) if home else None)


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
