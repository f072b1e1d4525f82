"""What one request is decoded with: published defaults, the server's, the request's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sglang_dllm.decoding import cache
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import Family

STEPS_PER_ROUND = 4
"""More gain little (benchmark/round_cost.py); a round is what an abort waits for."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Canvas length of a request that names none (d3LLM's evaluation length)."""

CUSTOM_PARAMS_KEY = "dllm"
"""Where a request's options are: ``custom_params: {"dllm": {...}}``."""


@dataclass(frozen=True)
class Decoding:
    """How one request is decoded.

    Attributes:
        unused: keys of the options that mean nothing for the model.
    """

    algorithm: Algorithm
    options: Options
    unused: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """As a response's ``meta_info.dllm`` says it."""
        used = self.options.model_dump(exclude=set(self.unused))
        return {"algorithm": self.algorithm.name, **used}


@dataclass(frozen=True)
class DecodeConfig:
    """The server's part: an algorithm for requests that name none, and defaults.

    Attributes:
        algorithm: name of the default algorithm.
        given: options of the YAML file, by algorithm.
        steps_per_round: forwards between two looks at the queue and the clients.
        prelaunch: whether the device runs the next round's first forward while the host
            hands out what was committed before; None for a GPU only.
    """

    family: Family
    algorithm: str
    given: Mapping[str, Mapping[str, Any]]
    steps_per_round: int = STEPS_PER_ROUND
    prelaunch: bool | None = None

    def resolve(
        self, request: Mapping[str, Any], answer_len: int | None = None
    ) -> Decoding:
        """What a request's ``dllm`` object comes to.

        Args:
            request: its keys, ``algorithm`` among them or not.
            answer_len: settles options that depend on it; None leaves them open.

        Raises:
            OptionError: an unknown algorithm or key, one that the algorithm or the
                model does not use, a wrong type or value.
        """
        name = request.get("algorithm", self.algorithm)
        algorithm = algorithms().get(name) if isinstance(name, str) else None
        if algorithm is None:
            raise OptionError("algorithm", name, f"one of {', '.join(algorithms())}")
        options = {key: value for key, value in request.items() if key != "algorithm"}
        exclusive = algorithm.options.exclusive
        merged = cache.defaults(self.family) | dict(algorithm.defaults(self.family))
        for layer in (self.given.get(name, {}), options):
            if any(key in layer for key in exclusive):
                for key in exclusive:
                    merged.pop(key, None)
            merged.update(layer)
        kind = merged.get("cache", "none")
        other_caches = {key for key, reader in cache.OPTIONS.items() if reader != kind}
        unused = algorithm.unused_keys(self.family, kind) | other_caches
        _refuse_unknown(algorithm, unused, options)
        parsed = _parse(algorithm, merged)
        _refuse_cache(algorithm, parsed)
        if answer_len is not None:
            parsed = algorithm.settle(parsed, answer_len, self.family)
        return Decoding(algorithm, parsed, unused)


def request_options(custom_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of a request's ``dllm`` object; null is a key left out."""
    given = (custom_params or {}).get(CUSTOM_PARAMS_KEY) or {}
    return {key: value for key, value in given.items() if value is not None}


def _refuse_unknown(
    algorithm: Algorithm, unused: frozenset[str], options: Mapping[str, Any]
) -> None:
    known = [key for key in algorithm.options.model_fields if key not in unused]
    for key, value in options.items():
        reader = cache.OPTIONS.get(key)
        if key in unused and reader:
            raise OptionError(key, value, f"nothing, unless cache is {reader}")
        if key not in known:
            raise OptionError(
                key,
                value,
                f"a key that {algorithm.name} uses on this model: {', '.join(known)}",
            )


def _refuse_cache(algorithm: Algorithm, options: Options) -> None:
    if options.cache not in algorithm.caches:
        allowed = ", ".join(algorithm.caches)
        raise OptionError("cache", options.cache, f"with {algorithm.name}: {allowed}")
    if options.cache != "none" and algorithm.is_guided(options):
        raise OptionError("cache", options.cache, "none, with guidance")


def _parse(algorithm: Algorithm, options: Mapping[str, Any]) -> Options:
    model = algorithm.options
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            keys = model.exclusive or tuple(options)
            given = {key: options.get(key) for key in keys}
            wanted = "one of them" if model.exclusive else first["msg"]
            raise OptionError(" and ".join(keys), given, wanted) from None
        key = str(first["loc"][0])
        raise OptionError(key, options.get(key), expected_of(model, key)) from None


def expected_of(model: type[BaseModel], key: str) -> str:
    """The description of a field, also where its annotation is ``... | None``."""
    field = model.model_fields[key]
    found = field.description
    for option in get_args(field.annotation):
        for info in getattr(option, "__metadata__", ()):
            found = found or getattr(info, "description", None)
    return str(found or "a value of the documented type")
