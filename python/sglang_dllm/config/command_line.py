"""The command line of a launch, before SGLang reads it.

SGLang reads the model's config while it reads the flags, and wrong ones end there in
a traceback. So it must be known before whether the launch is ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sglang_dllm.config.checkpoint_files import check_folder
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import ConfigError

_RENAMED = {
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
    "--cuda-graph-bs": "--cuda-graph-bs-decode",
}
"""Flags of d3LLM's launch lines, and what SGLang calls them now. It would take the old
names as abbreviations of several."""


@dataclass(frozen=True)
class CommandLine:
    """The flags that decide whose launch it is.

    Attributes:
        argv: the flags as they were given.
        algorithm: ``--dllm-algorithm``, there or in the file of ``--config``.
        model_path: likewise.
        config: the file of ``--config``.
    """

    argv: list[str]
    algorithm: str | None
    model_path: str | None
    config: str | None

    @classmethod
    def read(cls, argv: Sequence[str]) -> CommandLine:
        """Read the few flags; all others are SGLang's."""
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--dllm-algorithm", nargs="?")
        parser.add_argument("--model-path", "--model", nargs="?")
        parser.add_argument("--config", nargs="?")
        found, _ = parser.parse_known_args(list(argv))
        in_file = _read_file(found.config)
        return cls(
            list(argv),
            found.dllm_algorithm or in_file.get("dllm-algorithm"),
            found.model_path or in_file.get("model-path"),
            found.config,
        )

    @property
    def is_ours(self) -> bool:
        """True if the algorithm is one of ours."""
        return self.algorithm in algorithms()

    @property
    def known_argv(self) -> list[str]:
        """The flags under the names that SGLang knows."""
        words = (word.partition("=") for word in self.argv)
        return [_RENAMED.get(flag, flag) + sep + value for flag, sep, value in words]

    @property
    def subject(self) -> str:
        """The first words of a line about files that cannot be read.

        A path that is no folder is taken as the name of a repository, and the hub's
        message may not name it.
        """
        if self.model_path is None or Path(self.model_path).exists():
            return ""
        return f"--model-path={self.model_path!r}, which is no folder here"

    def check(self) -> None:
        """Refuse files that are not there.

        Raises:
            ConfigError: one line naming the flag and the path.
        """
        if self.config is not None and not Path(self.config).is_file():
            raise ConfigError(f"--config={self.config!r}: there is no such file")
        if self.model_path is not None:
            check_folder(self.model_path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """SGLang's own parser meets the same and says so."""


def _read_file(path: str | None) -> dict[str, str]:
    """The texts in a file of flags; nothing where SGLang will refuse the file."""
    try:
        content = yaml.safe_load(Path(path or "").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        str(key).replace("_", "-"): value
        for key, value in content.items()
        if isinstance(value, str)
    }
