"""Checks a checkpoint in the launching process, before a scheduler starts.

So a wrong checkpoint ends the launch with one line. The loading of the weights finds
the rest, and ends the scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.config_check import check_config
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.models.weight_files import check_weight_files


def check_checkpoint(
    fields: Mapping[str, Any], architecture: str, server_args: Any
) -> None:
    """Refuse a checkpoint that our modules would compute wrongly or cannot read.

    Args:
        fields: of config.json, with ``--json-model-override-args`` applied.
        server_args: the launch flags in effect.

    Raises:
        ConfigError: one line with the field or file, and what is expected.
    """
    check_config(fields, architecture)
    folder = Path(server_args.model_path)
    if folder.is_dir() and server_args.load_format in ("auto", "safetensors"):
        check_weight_files(folder)


def explain_unknown_model(model_path: str) -> None:
    """Refuse a folder without a readable config.json.

    Repositories and files pass: SGLang reports what it cannot read of them.

    Raises:
        ConfigError: the folder, or its config.json, is not there or is broken.
    """
    flag, path = f"--model-path={model_path!r}", Path(model_path)
    if not path.exists():
        if model_path.startswith("~"):
            raise ConfigError(f"{flag}: ~ is not expanded; expected the whole path")
        if model_path.startswith(("/", "./", "../")):
            raise ConfigError(f"{flag}: there is no such folder")
        return
    if not path.is_dir():
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{flag}: config.json: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{flag}: config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{flag}: config.json is not an object")
    raise ConfigError(
        f"{flag}: config.json: architectures={config.get('architectures')!r} names no "
        f"model; expected a list with one of {', '.join(FAMILIES)}"
    )
