"""The algorithms, caches and length rules of a server, with options, as plain JSON.

All of it comes from the option classes. Nothing is written by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from sglang_dllm.config.resolve import DecodeConfig, expected_of
from sglang_dllm.decoding.caches.base import CacheStrategy
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.lengths.base import LengthRule
from sglang_dllm.decoding.lengths.registry import LENGTHS
from sglang_dllm.decoding.registry import algorithms

_KEPT = (
    *("type", "enum", "minimum", "maximum", "maxItems", "items"),
    *("exclusiveMinimum", "exclusiveMaximum"),
)


def catalogue(decode: DecodeConfig) -> dict[str, Any]:
    """The choices of a request.

    Returns:
        ``default``: the algorithm of a request that names none. ``algorithms``,
        ``caches`` and ``lengths``: a list each, of ``name``, ``description`` and
        ``options``. An option has ``name``, the words of an error as ``description``,
        the keys of JSON Schema for its type and range, ``nullable``, and its
        ``default`` for the served model; that of an algorithm's own option is under
        the server's YAML. An algorithm has the names of its ``caches``, the default
        ``cache`` and ``length``, and the options that ``exclude`` each other.
    """
    return {
        "default": decode.algorithm,
        "algorithms": [_algorithm(decode, name) for name in algorithms()],
        "caches": [
            _strategy(one, one.defaults(decode.family)) for one in CACHES.values()
        ],
        "lengths": [_strategy(one, {}) for one in LENGTHS.values()],
    }


def _strategy(
    one: CacheStrategy[Any, Any] | LengthRule[Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": one.name,
        "description": _first_line(type(one)),
        "options": _options(one.options, one.options.model_fields, defaults),
    }


def _algorithm(decode: DecodeConfig, name: str) -> dict[str, Any]:
    algorithm = algorithms()[name]
    defaults = decode.defaults_of(algorithm)
    cache = defaults.get("cache", "none")
    unused = algorithm.unused_keys(decode.family, cache)
    keys = [key for key in algorithm.options.model_fields if key not in unused]
    return {
        "name": name,
        "description": _first_line(type(algorithm)),
        "caches": list(algorithm.caches),
        "cache": cache,
        "length": defaults.get("length", "fixed"),
        "exclude": list(algorithm.options.mutually_exclusive),
        "options": _options(algorithm.options, keys, defaults),
    }


def _options(
    model: type[BaseModel], keys: Iterable[str], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    properties = model.model_json_schema()["properties"]
    return [
        {
            "name": key,
            "description": expected_of(model, key),
            **_type_and_range(properties[key]),
            "default": defaults.get(key, model.model_fields[key].default),
        }
        for key in keys
    ]


def _type_and_range(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of JSON Schema; ``T | None`` has those of T, and is nullable."""
    variants = schema.get("anyOf", [schema])
    kinds = [one for one in variants if one.get("type") != "null"]
    # An option of an algorithm from outside may have several types: any JSON then.
    given = kinds[0] if len(kinds) == 1 else {}
    found = {key: given[key] for key in _KEPT if key in given}
    if "const" in given:
        found["enum"] = [given["const"]]
    return {**found, "nullable": len(kinds) < len(variants)}


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]
