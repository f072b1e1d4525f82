"""`doctor --model`: what it says of good and of broken checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.changed_checkpoints import change_config
from helpers.tiny_a2d_checkpoints import write_a2d_qwen3
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import (
    DIFFULLAMA_FLAGS,
    write_diffullama,
    write_llada_moe,
)
from sglang_dllm.__main__ import main

CUDA = ("--device", "cuda", "--device-memory", "80")


def asked(
    capsys: pytest.CaptureFixture[str], folder: Path, *flags: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the checks by their names."""
    status = main(["doctor", "--model", str(folder), "--json", *flags])
    found = json.loads(capsys.readouterr().out)
    assert found["loads"] is (status == 0)
    return status, {check["name"]: check for check in found["checks"]}


@pytest.mark.parametrize(
    "write", [write_llada, write_dream, write_llada_moe, write_a2d_qwen3]
)
@pytest.mark.parametrize("device", [(), CUDA], ids=["cpu", "cuda"])
def test_a_good_checkpoint_would_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write: Any, device: Any
) -> None:
    status, checks = asked(capsys, write(tmp_path), *device)
    assert status == 0, checks
    assert checks["device"]["ok"] is True
    assert (checks["graphs"]["graphs"] > 0) is (device == CUDA)
    expected = "flashinfer" if device else "torch_native"
    assert checks["attention"]["text"] == expected


def test_overridden_fields_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Its published config.json names Llama, and the launch line names the rest.
    folder = write_diffullama(tmp_path)
    status, checks = asked(capsys, folder)
    assert (status, checks["model"]["ok"]) == (1, False)
    assert asked(capsys, folder, *DIFFULLAMA_FLAGS)[0] == 0


def test_sizes_are_those_of_the_tensors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = write_llada(tmp_path, num_shards=2, dtype=torch.bfloat16)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    flags = (*CUDA, "--context-length", "128", "--dtype")
    _, half = asked(capsys, folder, *flags, "bfloat16")
    _, full = asked(capsys, folder, *flags, "float32")
    weights = half["memory"]["weights"]
    # The rest of the files is their headers.
    assert stored - 8192 < weights < stored
    assert full["memory"]["weights"] == 2 * weights
    # Keys and values of 2 layers of 64 numbers.
    assert half["kv pool"]["bytes_per_token"] == 2 * 2 * 64 * 2
    assert half["kv pool"]["bytes_per_canvas"] == 2 * 2 * 64 * 2 * 128


def break_architecture(folder: Path) -> None:
    change_config(folder, {"architectures": ["GPT2LMHeadModel"]})


def break_field(folder: Path) -> None:
    change_config(folder, {"clip_qkv": 3})


def break_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def break_file(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (break_architecture, "model", "GPT2LMHeadModel"),
        (break_field, "config", "clip_qkv"),
        (break_shard, "weights", "model-00002"),
        (break_file, "weights", "cut off"),
        (break_tokenizer, "tokenizer", "token"),
    ],
)
def test_a_broken_checkpoint_would_not(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    damage: Any,
    name: str,
    says: str,
) -> None:
    folder = write_llada(tmp_path, num_shards=2)
    damage(folder)
    status, checks = asked(capsys, folder)
    assert status == 1
    assert [key for key, check in checks.items() if check["ok"] is False] == [name]
    assert says in checks[name]["text"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--device-memory", "0.0001"), "device"),
        (("--context-length", "100000"), "context"),
        (("--attention-backend", "fa3"), "attention"),
        (("--dtype", "int8"), "dtype"),
    ],
)
def test_what_is_asked_may_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: Any, name: str
) -> None:
    status, checks = asked(capsys, write_llada(tmp_path), *flags)
    assert (status, checks[name]["ok"]) == (1, False)


def test_a_person_gets_one_line_for_each_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", "--model", str(write_llada(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip() == "would load"
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * 8 + ["-"] * 3 + ["ok"]
    assert main(["doctor", "--model", str(tmp_path / "nothing")]) == 1
