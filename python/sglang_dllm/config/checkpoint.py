"""Checks a checkpoint in the launching process, before a scheduler starts.

So a wrong checkpoint ends the launch with one line. The loading of the weights finds
the rest, and ends the scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_dllm.config.checkpoint_files import check_folder, check_weights
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.config_check import check_config
from sglang_dllm.models.facts import FAMILIES


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
    check_weights(server_args.model_path, server_args.load_format)


def refused_model(algorithm: str, architecture: str | None) -> ConfigError:
    """The error of one of our algorithms on a model that is not ours."""
    return ConfigError(
        f"--dllm-algorithm={algorithm!r} does not decode {architecture}; expected a "
        f"model of one of the architectures {', '.join(FAMILIES)}"
    )


def explain_unknown_model(model_path: str) -> None:
    """Refuse a folder without a readable config.json.

    Repositories and files pass: SGLang reports what it cannot read of them.

    Raises:
        ConfigError: the folder, or its config.json, is not there or is broken.
    """
    check_folder(model_path)
    if not Path(model_path).is_dir():
        return
    text = (Path(model_path) / "config.json").read_text(encoding="utf-8")
    names = json.loads(text).get("architectures")
    raise ConfigError(
        f"--model-path={model_path!r}: config.json: architectures={names!r} names no "
        f"model; expected a list with one of {', '.join(FAMILIES)}"
    )
