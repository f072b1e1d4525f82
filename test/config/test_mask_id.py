"""A mask id that config.json does not have comes from the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.changed_checkpoints import change_config
from helpers.tiny_a2d_checkpoints import (
    ILLADA_TOKENS,
    LLAMA3_TOKENS,
    QWEN_TOKENS,
    write_a2d_llama,
    write_a2d_qwen2,
    write_a2d_qwen3,
    write_illada,
)
from helpers.tiny_checkpoints import write_llada
from sglang_dllm.config.mask_id import settle_mask_id
from sglang_dllm.models.facts import FAMILIES, architecture_in


def settled(path: Path, **flags: Any) -> dict[str, Any]:
    """The overrides of config.json after the mask id is settled."""
    given = {"tokenizer_path": None, "json_model_override_args": "{}"} | flags
    args = SimpleNamespace(model_path=str(path), revision=None, **given)
    config = json.loads((path / "config.json").read_text())
    fields = config | json.loads(args.json_model_override_args)
    architecture = architecture_in(fields)
    assert architecture is not None
    settle_mask_id(args, FAMILIES[architecture], fields)
    overrides: dict[str, Any] = json.loads(args.json_model_override_args)
    return overrides


def rename_mask(path: Path, old: str, new: str) -> Path:
    """Give the mask another text, and let nothing say that it is one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = path / name
        text = file.read_text().replace(old, new)
        if name == "tokenizer_config.json":
            config = json.loads(text)
            config.pop("mask_token", None)
            text = json.dumps(config)
        file.write_text(text)
    return path


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (write_illada, ILLADA_TOKENS["<[MASK]>"]),
        (write_a2d_qwen3, QWEN_TOKENS["<|mask|>"]),
        (write_a2d_qwen2, QWEN_TOKENS["<|mask|>"]),
        (write_a2d_llama, LLAMA3_TOKENS["<|mask|>"]),
    ],
)
def test_the_tokenizer_has_it(
    write: Callable[[Path], Path], wanted: int, tmp_path: Path
) -> None:
    path = write(tmp_path)
    assert "mask_token_id" not in json.loads((path / "config.json").read_text())
    assert settled(path) == {"mask_token_id": wanted}
    # The other overrides stay.
    others = json.dumps({"use_cache": False})
    found = settled(path, json_model_override_args=others)
    assert found == {"use_cache": False, "mask_token_id": wanted}


def test_a_mask_that_the_tokenizer_names_may_have_any_text(tmp_path: Path) -> None:
    path = write_a2d_qwen3(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = path / name
        file.write_text(file.read_text().replace("<|mask|>", "<|MASK|>"))
    assert settled(path) == {"mask_token_id": QWEN_TOKENS["<|mask|>"]}


def test_config_json_and_the_launch_line_come_first(tmp_path: Path) -> None:
    path = write_a2d_qwen3(tmp_path)
    line = json.dumps({"mask_token_id": 270})
    assert settled(path, json_model_override_args=line) == {"mask_token_id": 270}
    assert settled(change_config(path, {"mask_token_id": 271})) == {}
    assert settled(write_llada(tmp_path / "llada")) == {}


def test_a_folder_without_a_mask_gets_none(tmp_path: Path) -> None:
    path = rename_mask(write_illada(tmp_path / "illada"), "<[MASK]>", "<[GAP]>")
    assert settled(path) == {}
    path = rename_mask(write_a2d_llama(tmp_path / "llama"), "<|mask|>", "<|gap|>")
    assert settled(path) == {}
    (path / "tokenizer.json").unlink()
    assert settled(path) == {}
