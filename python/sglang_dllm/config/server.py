"""The server's configuration from ``--dllm-algorithm`` and its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sglang_dllm.config.resolve import STEPS_PER_ROUND, DecodeConfig
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import ConfigError, OptionError
from sglang_dllm.models.facts import Family

CACHE_OFF = 10_000
"""d3LLM's value of ``cache_delay_iter`` and ``refresh_interval`` for "never": in a
server's configuration without a cache these say what is so anyway."""


def parse_decode_config(
    algorithm: str, family: Family, options: Mapping[str, Any]
) -> DecodeConfig:
    """The server's configuration from the contents of its YAML file.

    Raises:
        ConfigError: an unknown algorithm or key, a wrong type or value.
    """
    if algorithm not in algorithms():
        raise ConfigError(
            f"--dllm-algorithm {algorithm} does not decode {family.architecture}; "
            f"choose one of {', '.join(algorithms())}"
        )
    server = ("algorithms", "steps_per_round", "overlap")
    own = {key: value for key, value in options.items() if key not in server}
    steps = options.get("steps_per_round", STEPS_PER_ROUND)
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise ConfigError(
            f"--dllm-algorithm-config: steps_per_round={steps!r} is not allowed; "
            "expected an integer, 1 to 1000"
        )
    overlap = options.get("overlap")
    if not (overlap is None or isinstance(overlap, bool)):
        raise ConfigError(
            f"--dllm-algorithm-config: overlap={overlap!r} is not allowed; expected "
            "true or false"
        )
    if own.get("cache", "none") == "none":
        for key in ("cache_delay_iter", "refresh_interval"):
            if own.get(key) == CACHE_OFF:
                del own[key]
    others = options.get("algorithms", {})
    if not isinstance(others, dict) or not all(
        isinstance(keys, dict) for keys in others.values()
    ):
        raise ConfigError(
            f"--dllm-algorithm-config: algorithms={others!r} is not allowed; "
            "expected a mapping of algorithms to their options"
        )
    if own and algorithm in others:
        raise ConfigError(
            f"--dllm-algorithm-config: options of {algorithm} stand both at the top "
            "and under algorithms; expected one of the two"
        )
    given = {**others, **({algorithm: own} if own else {})}
    given = {
        name: {key: value for key, value in keys.items() if value is not None}
        for name, keys in given.items()
    }
    config = DecodeConfig(family, algorithm, given, steps, overlap)
    for name, keys in {algorithm: {}, **given}.items():
        if "algorithm" in keys:
            raise ConfigError(
                f"--dllm-algorithm-config: algorithm={keys['algorithm']!r} is not "
                "allowed; expected the algorithm's options: --dllm-algorithm names it"
            )
        try:
            DecodeConfig(family, algorithm, {}).resolve({"algorithm": name, **keys})
        except OptionError as error:
            raise ConfigError(f"--dllm-algorithm-config: {error}") from None
    return config


def load_decode_config(
    algorithm: str, family: Family, path: str | None
) -> DecodeConfig:
    """As parse_decode_config, with the options read from a YAML file.

    Raises:
        ConfigError: also for a file that is missing or is not a YAML mapping.
    """
    if path is None:
        return parse_decode_config(algorithm, family, {})
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--dllm-algorithm-config {path}: {reason}") from None
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"--dllm-algorithm-config {path}: expected a mapping of keys to values, "
            f"found {type(options).__name__}"
        )
    return parse_decode_config(
        algorithm, family, {str(key): value for key, value in options.items()}
    )
