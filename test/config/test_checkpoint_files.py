"""Folders that cannot be loaded are named before a process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_dllm.config.checkpoint import explain_unknown_model
from sglang_dllm.config.checkpoint_files import check_folder, check_weights
from sglang_dllm.config.command_line import CommandLine
from sglang_dllm.demo import demo_path
from sglang_dllm.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_path(), tmp_path / "model"))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def cut(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-1])


def index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "cut config": (lambda f: (f / "config.json").write_text("{"), "config.json: "),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object"),
    "latin-1": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: "),
    "no weights": (lambda f: weights(f).unlink(), "has no weights"),
    "cut weights": (cut, "is cut off"),
    "empty weights": (lambda f: weights(f).write_bytes(b""), "has 0 bytes"),
    "git lfs": (
        lambda f: weights(f).write_bytes(b"version https://git-lfs\noid sha256:0"),
        "pointer of Git LFS",
    ),
    "no header": (
        lambda f: weights(f).write_bytes((2).to_bytes(8, "little") + b"{]"),
        "no safetensors file",
    ),
    "a shard": (lambda f: index(f, {"weight_map": {"a": "b.safetensors"}}), "names b"),
    "no map": (lambda f: index(f, {"weight_map": []}), "a weight_map"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(folder: Path, name: str) -> None:
    change, words = WRONG[name]
    change(folder)
    with pytest.raises(ConfigError, match=words):
        check_folder(str(folder))
        check_weights(str(folder), "auto")


def test_what_can_be_loaded_passes(folder: Path) -> None:
    for path in (str(folder), f"{folder}/", "org/repository", "name"):
        check_folder(path)
        check_weights(path, "auto")
    two = folder / "model-2.safetensors"
    shutil.copy(weights(folder), two)
    check_weights(str(folder), "auto")
    weights(folder).unlink()
    two.rename(folder / "pytorch_model.bin")
    check_weights(str(folder), "auto")
    (folder / "pytorch_model.bin").unlink()
    check_weights(str(folder), "dummy")


def test_a_path_that_is_not_there_is_no_repository(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(ConfigError, match="there is no such folder"):
            check_folder(path)


def test_a_folder_of_another_model_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="architectures=None names no model"):
        explain_unknown_model(str(folder))


def test_repositories_and_files_are_sglangs_to_explain(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    explain_unknown_model(str(tmp_path / "model.gguf"))
    explain_unknown_model("someone/model")


OURS = ["--dllm-algorithm", "LLaDA"]


@pytest.mark.parametrize(
    ("argv", "is_ours", "path"),
    [
        (["--model-path", "a", *OURS], True, "a"),
        (["--model=a", "--dllm-algorithm=LLaDA"], True, "a"),
        (["--model-path", "a"], False, "a"),
        (["--model-path", "a", "--dllm-algorithm", "LowConfidence"], False, "a"),
        (["--model-path", "a", "--dllm-algorithm"], False, "a"),
        (["--dllm-algorithm", "--model-path", "a"], False, "a"),
    ],
)
def test_whose_launch_it_is(argv: list[str], is_ours: bool, path: str) -> None:
    given = CommandLine.read(argv)
    assert (given.is_ours, given.model_path) == (is_ours, path)


def test_a_file_of_flags_counts_too(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("model-path: /none\ndllm-algorithm: LLaDA\ntp-size: 2\n")
    given = CommandLine.read(["--config", str(file)])
    assert given.is_ours
    with pytest.raises(ConfigError, match="--model-path='/none'"):
        given.check()
    # The command line comes before the file, as in SGLang.
    assert CommandLine.read(["--config", str(file), "--model", "b"]).model_path == "b"
    file.unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        CommandLine.read(["--config", str(file), *OURS]).check()
    file.write_text("[")
    CommandLine.read(["--config", str(file), *OURS]).check()


def test_the_flags_of_d3llm_get_their_present_names() -> None:
    given = CommandLine.read(["--cuda-graph-bs", "1", "2", "--cuda-graph-max-bs=4"])
    assert given.known_argv == [
        *("--cuda-graph-bs-decode", "1", "2"),
        "--cuda-graph-max-bs-decode=4",
    ]
