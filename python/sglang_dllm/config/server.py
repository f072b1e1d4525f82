"""The server's configuration from ``--dllm-algorithm`` and its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dllm.config.resolve import (
    MAX_BODY_BYTES,
    STEPS_PER_ROUND,
    DecodeConfig,
    expected_of,
)
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import ConfigError, OptionError
from sglang_dllm.models.facts import FAMILIES, Family

CACHE_OFF = 10_000
"""The value by which d3LLM's files say "never" in ``cache_delay_iter`` and
``refresh_interval``. It is accepted, and dropped, where no cache is configured."""

_FLAG = "--dllm-algorithm-config"


class ServerConfig(BaseModel):
    """The keys of the YAML file.

    Every other key is an option of the algorithm that ``--dllm-algorithm`` names.

    Attributes:
        steps_per_round: forwards between two looks at the queue and the clients.
        prelaunch: whether the first forward of a round is launched before the round
            before it ends. None: on a GPU only.
        max_body_bytes: the largest body of a request.
        algorithms: options of other algorithms, by the algorithm's name.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    steps_per_round: Annotated[
        int, Field(ge=1, le=1000, description="an integer, 1 to 1000")
    ] = STEPS_PER_ROUND
    prelaunch: Annotated[bool, Field(description="true or false")] | None = None
    max_body_bytes: Annotated[
        int, Field(ge=1024, le=2**31, description=f"an integer, 1024 to {2**31}")
    ] = MAX_BODY_BYTES
    algorithms: Annotated[
        dict[Any, dict[Any, Any]],
        Field(description="a mapping of algorithms to their options"),
    ] = {}

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> ServerConfig:
        """Check the keys of the file itself, not the options of algorithms.

        Raises:
            ConfigError: a wrong type or value, or a key that has another name now.
        """
        if "overlap" in options:
            raise ConfigError(f"{_FLAG}: overlap is now called prelaunch")
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            key = str(error.errors(include_url=False)[0]["loc"][0])
            raise ConfigError(
                f"{_FLAG}: {key}={options[key]!r} is not allowed; "
                f"expected {expected_of(cls, key)}"
            ) from None

    def options_of(self, algorithm: str) -> dict[str, dict[str, Any]]:
        """The options of all algorithms that the file has some for.

        Args:
            algorithm: whose options stand at the top of the file. null is a key left
                out.

        Raises:
            ConfigError: options of one algorithm stand in two places, or name another
                algorithm.
        """
        top = dict(self.model_extra or {})
        if top.get("cache", "none") == "none":
            for key in ("cache_delay_iter", "refresh_interval"):
                if top.get(key) == CACHE_OFF:
                    del top[key]
        if top and algorithm in self.algorithms:
            raise ConfigError(
                f"{_FLAG}: options of {algorithm} stand both at the top "
                "and under algorithms; expected one of the two"
            )
        found = {**self.algorithms, **({algorithm: top} if top else {})}
        for keys in found.values():
            if keys.get("algorithm") is not None:
                raise ConfigError(
                    f"{_FLAG}: algorithm={keys['algorithm']!r} is not allowed; "
                    "expected the algorithm's options: --dllm-algorithm names it"
                )
        return {
            name: {key: value for key, value in keys.items() if value is not None}
            for name, keys in found.items()
        }


def decodes(algorithm: str | None, architecture: str | None) -> bool:
    """True if ``--dllm-algorithm`` and the model make a server of ours.

    A model of ours under the algorithm of another plugin is that plugin's.
    """
    return architecture in FAMILIES and algorithm in algorithms()


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
    server = ServerConfig.parse(options)
    given = server.options_of(algorithm)
    published = DecodeConfig(family, algorithm, {})
    for name, keys in {algorithm: {}, **given}.items():
        try:
            published.resolve({"algorithm": name, **keys})
        except OptionError as error:
            raise ConfigError(f"{_FLAG}: {error}") from None
    return DecodeConfig(
        family,
        algorithm,
        given,
        server.steps_per_round,
        server.prelaunch,
        server.max_body_bytes,
    )


@lru_cache(maxsize=8)
def load_decode_config(
    algorithm: str, family: Family, path: str | None
) -> DecodeConfig:
    """As parse_decode_config, with the options read from a YAML file.

    A process reads a file once: a file that changes while a server runs would
    otherwise be one thing at launch and another at the first request.

    Raises:
        ConfigError: also for a file that is missing or is not a YAML mapping.
    """
    if path is None:
        return parse_decode_config(algorithm, family, {})
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{_FLAG} {path}: {reason}") from None
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{_FLAG} {path}: expected a mapping of keys to values, "
            f"found {type(options).__name__}"
        )
    return parse_decode_config(
        algorithm, family, {str(key): value for key, value in options.items()}
    )
