"""Server-wide decoding configuration: parsed and validated once, then frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dllm.errors import ConfigError
from sglang_dllm.families import Family

CACHE_OFF = 10_000
"""d3LLM's value of ``cache_delay_iter`` and ``refresh_interval`` for "never"."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Canvas length of a request that names none (d3LLM's evaluation length)."""

# The description is what an error message says is allowed.
_BlockSize = Annotated[int, Field(ge=1, le=4096, description="an integer, 1 to 4096")]
_Nats = Annotated[float, Field(ge=0, le=1000, description="nats, 0 to 1000")]
_Progress = Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")]
_Bool = Annotated[bool, Field(description="true or false")]
_CacheOff = Annotated[
    int,
    Field(
        ge=CACHE_OFF,
        le=CACHE_OFF,
        description=f"{CACHE_OFF} (never): cached canvases are not available",
    ),
]


class EntropyThresholdConfig(BaseModel):
    """Decoding one block after the other (d3LLM ``generate``)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    block_size: _BlockSize = 32
    threshold: _Nats
    early_stop: _Bool
    cache_delay_iter: _CacheOff = CACHE_OFF
    refresh_interval: _CacheOff = CACHE_OFF

    @property
    def block_add_progress(self) -> float:
        return 1.0

    @property
    def activate_progress(self) -> float:
        return 1.0


class FullAttnMultiBlockConfig(EntropyThresholdConfig):
    """Decoding several blocks at once (d3LLM ``generate_multi_block``)."""

    block_add_threshold: _Progress = 0.1
    decoded_token_threshold: _Progress = 0.95

    @property
    def block_add_progress(self) -> float:
        return self.block_add_threshold

    @property
    def activate_progress(self) -> float:
        return self.decoded_token_threshold


DecodeConfig = EntropyThresholdConfig

ALGORITHMS: dict[str, type[EntropyThresholdConfig]] = {
    "EntropyThreshold": EntropyThresholdConfig,
    "FullAttnMultiBlock": FullAttnMultiBlockConfig,
}


def parse_decode_config(
    algorithm: str, family: Family, options: dict[str, Any]
) -> DecodeConfig:
    """The algorithm's configuration: the family's published defaults, then options.

    Raises:
        ConfigError: an unknown algorithm or key, a wrong type or value.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            f"--dllm-algorithm {algorithm} does not decode {family.architecture}; "
            f"choose one of {', '.join(ALGORITHMS)}"
        )
    model = ALGORITHMS[algorithm]
    try:
        return model.model_validate({**family.defaults[algorithm], **options})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"--dllm-algorithm-config: unknown key {key!r} "
                f"(value {first['input']!r}) for {algorithm}; "
                f"known keys: {', '.join(model.model_fields)}"
            ) from None
        raise ConfigError(
            f"--dllm-algorithm-config: {key}={first['input']!r} is not allowed; "
            f"expected {model.model_fields[key].description}"
        ) from None


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
