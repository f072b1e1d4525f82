"""Weight files that are not whole are found by their headers."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.tiny_checkpoints import write_dream
from sglang_dllm.config.checkpoint import explain_unknown_model
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.weight_files import check_weight_files
from sglang_dllm.user_folder import (
    choose_compiler_folder,
    home_cache,
    temporary_folder,
)

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def cut(path: Path) -> None:
    (path / ONE).write_bytes((path / ONE).read_bytes()[:-4])


def pointer(path: Path) -> None:
    (path / ONE).write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: (path / ONE).unlink(), "no weights"),
        (cut, f"{ONE} is not whole"),
        (pointer, f"{ONE} is not"),
        (lambda path: (path / ONE).write_bytes(b""), f"{ONE} is not"),
        (lambda path: (path / ONE).write_bytes(b"\2" + bytes(7) + b"[]"), ONE),
        (lambda path: (path / INDEX).write_text("{"), INDEX),
        (
            lambda path: (path / INDEX).write_text(
                json.dumps({"weight_map": {"a": "gone.safetensors"}})
            ),
            "gone.safetensors",
        ),
    ],
)
def test_a_broken_file_is_named(
    change: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    path = write_dream(tmp_path / "model")
    change(path)
    with pytest.raises(ConfigError) as error:
        check_weight_files(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_files_pass(tmp_path: Path) -> None:
    check_weight_files(write_dream(tmp_path / "one"))
    shards = write_dream(tmp_path / "shards", num_shards=2)
    check_weight_files(shards)
    (shards / INDEX).unlink()
    check_weight_files(shards)
    torch.save({}, tmp_path / "pytorch_model.bin")
    check_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "not JSON"), ("[]", "not an object"), ("{}", "architectures=None")],
)
def test_a_broken_config_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=named):
        explain_unknown_model(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "named"), [("~/model", "~ is not"), ("/nope/x", "no such folder")]
)
def test_a_folder_that_is_not_there(path: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        explain_unknown_model(path)


def test_repositories_and_files_are_sglangs_to_explain(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    explain_unknown_model(str(tmp_path / "model.gguf"))
    explain_unknown_model("someone/model")


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
