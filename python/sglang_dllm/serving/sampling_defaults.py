"""The sampling of a request that names none: one answer for every route."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, DecodeConfig, request_options
from sglang_dllm.errors import ConfigError, OptionError, RequestError
from sglang_dllm.serving.bad_request import refused
from sglang_dllm.serving.body import check_sampling
from sglang_dllm.serving.fields import NativeSampling

logger = logging.getLogger(__name__)

_FLAG = "--preferred-sampling-params"

# Fields of a generation_config.json that would change the answer, with the values that
# change nothing. Dream's own fields (alg, steps, eps) are options of a request here.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 0, 1),
    "length_penalty": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "typical_p": (None, 1),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling of a request that names none. Greedy: as the published samplers."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1

    @classmethod
    def of_server(
        cls,
        preferred: Mapping[str, Any] | None,
        generation_config: Mapping[str, Any] | None,
    ) -> SamplingDefaults:
        """The defaults of a server.

        Args:
            preferred: ``--preferred-sampling-params``; they come first.
            generation_config: the checkpoint's generation_config.json; None where
                ``--sampling-defaults`` turns it off.
        """
        chosen = {
            **_honoured(generation_config or {})[0],
            **{k: v for k, v in (preferred or {}).items() if v is not None},
        }
        fields = cls.__dataclass_fields__
        return cls(**{name: chosen[name] for name in fields if name in chosen})

    def to_dict(self) -> dict[str, Any]:
        """As a request would name them; what turns nothing on is left out."""
        neutral = {"top_p": 1.0, "top_k": -1}
        return {k: v for k, v in asdict(self).items() if neutral.get(k) != v}


def generation_config_of(model_config: Any) -> dict[str, Any] | None:
    """The generation_config.json that the defaults come from; None for no file.

    A field that no request gets is logged, once.

    Args:
        model_config: SGLang's.
    """
    config = model_config.hf_generation_config
    if config is None or model_config.sampling_defaults != "model":
        return None
    fields: dict[str, Any] = config.to_dict()
    dropped = _honoured(fields)[1]
    if dropped:
        _warn(", ".join(f"{name}={value!r}" for name, value in dropped.items()))
    return fields


@cache
def _warn(dropped: str) -> None:
    logger.warning(
        "generation_config.json: %s is not supported for this model and has no effect",
        dropped,
    )


def _honoured(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields for requests in a generation_config.json, and the dropped ones."""
    honoured, dropped = {}, {}
    for name in SamplingDefaults.__dataclass_fields__:
        value = config.get(name)
        if value is None or (name == "top_k" and value == 0):
            continue
        try:
            NativeSampling.model_validate({name: value})
            honoured[name] = value
        except ValidationError:
            dropped[name] = value
    if config.get("do_sample") is False:
        # Transformers ignores the others then.
        honoured = {"temperature": 0.0}
    for name, neutral in _NOT_HONOURED.items():
        if config.get(name) not in neutral:
            dropped[name] = config[name]
    return honoured, dropped


def check_preferred(preferred: Any, decode: DecodeConfig, vocab_size: int) -> None:
    """Refuse ``--preferred-sampling-params`` that a request could not name either.

    Args:
        preferred: the flag's value: JSON or what it says.

    Raises:
        ConfigError: one line with the field, its value and what is allowed.
    """
    if not preferred:
        return
    try:
        given = json.loads(preferred) if isinstance(preferred, str) else preferred
    except ValueError as error:
        raise ConfigError(f"{_FLAG} is not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{_FLAG}={preferred!r} is not allowed; expected an object")
    try:
        check_sampling(given, vocab_size, "")
        custom = given.get("custom_params") or {}
        if custom.keys() - {CUSTOM_PARAMS_KEY} or not isinstance(
            custom.get(CUSTOM_PARAMS_KEY) or {}, dict
        ):
            expected = 'an object {"dllm": {...}}'
            raise refused("custom_params", custom, expected)
        decode.resolve(request_options(custom))
    except (RequestError, OptionError) as error:
        raise ConfigError(f"{_FLAG}: {error}") from None
