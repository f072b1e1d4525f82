"""The options of one request: published defaults, the server's, the request's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sglang_dllm.config.canvas_parts import CANVAS_KEY, CanvasParts
from sglang_dllm.config.watching import Watching
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.caches.registry import READERS as CACHE_READERS
from sglang_dllm.decoding.lengths.base import LengthRule
from sglang_dllm.decoding.lengths.fixed import FIXED
from sglang_dllm.decoding.lengths.registry import LENGTHS
from sglang_dllm.decoding.lengths.registry import READERS as LENGTH_READERS
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import Family

STEPS_PER_ROUND = 4
"""More steps gain little (round_cost.py), and an abort waits for a round."""

MAX_BODY_BYTES = 4 << 20
"""Bytes of a body, unless the YAML file says otherwise."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Length of a fixed canvas of a request that names none (d3LLM's evaluation length)."""

OPEN_LENGTH = "append"
"""Length rule of a request that names neither a rule nor a length."""

TOKEN_KEYS = ("allowed_token_ids", "bad_words")
"""The keys of ``config.token_fields``."""

CUSTOM_PARAMS_KEY = "dllm"
"""The key of a request's options: ``custom_params: {"dllm": {...}}``."""

OPTIONS_PATH = f"custom_params.{CUSTOM_PARAMS_KEY}"
"""The path to that object, for errors."""

SCORE_KEY = "score"
"""The key of the ``dllm`` object that asks for a score (``config.scoring``)."""

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class DecodeConfig:
    """The server's part: an algorithm for requests that name none, and defaults.

    Attributes:
        algorithm: name of the default algorithm.
        given: options of the YAML file, by algorithm.
        steps_per_round: forwards between two looks at the queue and the clients.
        prelaunch: whether the next round's first forward is launched before a round
            ends. None: on a GPU only.
        max_body_bytes: of a request.
    """

    family: Family
    algorithm: str
    given: Mapping[str, Mapping[str, Any]]
    steps_per_round: int = STEPS_PER_ROUND
    prelaunch: bool | None = None
    max_body_bytes: int = MAX_BODY_BYTES

    def resolve(self, request: Mapping[str, Any]) -> Decoding:
        """The options that a request's ``dllm`` object comes to.

        Args:
            request: its keys, with or without ``algorithm``.

        Raises:
            OptionError: an unknown algorithm or key, a key that the algorithm or the
                model does not use, a wrong type or value.
        """
        name = request.get("algorithm", self.algorithm)
        algorithm = algorithms().get(name) if isinstance(name, str) else None
        if algorithm is None:
            raise OptionError("algorithm", name, f"one of {', '.join(algorithms())}")
        options = {key: value for key, value in request.items() if key != "algorithm"}
        merged = self._merged(algorithm, options)
        kind = merged.get("cache", "none")
        cache = CACHES.get(kind) if isinstance(kind, str) else None
        cache_keys = () if cache is None else tuple(cache.options.model_fields)
        length_name = merged.get("length", "fixed")
        length = LENGTHS.get(length_name) if isinstance(length_name, str) else None
        length_keys = () if length is None else tuple(length.options.model_fields)
        unused = algorithm.unused_keys(self.family, kind)
        own_keys = [key for key in algorithm.options.model_fields if key not in unused]
        own_keys.sort(key=lambda key: key not in Options.model_fields)
        selectors = ["cache", *cache_keys, "length", *length_keys]
        _refuse_unknown(algorithm, options, [*selectors, *own_keys])
        if cache is None:
            raise OptionError("cache", kind, _one_of(CACHES))
        if length is None:
            raise OptionError("length", length_name, _one_of(LENGTHS))
        cache_options = parse_options(
            cache.options, {key: merged[key] for key in cache_keys if key in merged}
        )
        length_options = parse_options(
            length.options, {key: merged[key] for key in length_keys if key in merged}
        )
        readers = {"cache", *CACHE_READERS, "length", *LENGTH_READERS}
        parsed = parse_options(
            algorithm.options,
            {key: value for key, value in merged.items() if key not in readers},
        )
        if kind not in algorithm.caches:
            allowed = ", ".join(algorithm.caches)
            raise OptionError("cache", kind, f"with {algorithm.name}: {allowed}")
        if cache.keeps_kv and algorithm.is_guided(parsed):
            raise OptionError("cache", kind, "none, with guidance")
        if not length.keeps_length:
            _check_resizable(algorithm, parsed, length, own_keys)
        return Decoding(
            algorithm, parsed, cache, cache_options, length, length_options, unused
        )

    def resolve_open(self, request: Mapping[str, Any]) -> Decoding:
        """As ``resolve``, for a request that does not say how long its answer may be.

        The answer grows until it ends, unless the request or the server names a rule
        for its length, or the algorithm cannot grow.

        Raises:
            OptionError: as ``resolve``.
        """
        decoding = self.resolve(request)
        server = self.given.get(decoding.algorithm.name, {})
        if "length" in request or "length" in server:
            return decoding
        try:
            return self.resolve({**request, "length": OPEN_LENGTH})
        except OptionError:
            return decoding

    def resolve_given(self, request: Mapping[str, Any]) -> Decoding:
        """As ``resolve``, for a request that gives a part of its answer.

        The canvas says how long the answer is.

        Raises:
            OptionError: as ``resolve``; or the request names a rule for the length.
        """
        named = request.get("length", FIXED.name)
        if named != FIXED.name:
            raise OptionError("length", named, f"{FIXED.name}, with {CANVAS_KEY}")
        return self.resolve({**request, "length": FIXED.name})

    def defaults_of(self, algorithm: Algorithm[Any, Any]) -> dict[str, Any]:
        """The options of a request that names the algorithm alone."""
        return self._merged(algorithm, {})

    def _merged(
        self, algorithm: Algorithm[Any, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Published defaults, under the server's options, under the request's."""
        exclusive = algorithm.options.mutually_exclusive
        merged: dict[str, Any] = {}
        for cache in CACHES.values():
            merged |= cache.defaults(self.family)
        merged |= algorithm.defaults(self.family)
        for layer in (self.given.get(algorithm.name, {}), options):
            if any(key in layer for key in exclusive):
                for key in exclusive:
                    merged.pop(key, None)
            merged.update(layer)
        return merged


def dllm_object(custom_params: Any) -> dict[str, Any]:
    """The ``dllm`` object of a request; null is a key left out.

    Empty where there is none, or where something else is in its place.
    """
    is_object = isinstance(custom_params, dict)
    given = custom_params.get(CUSTOM_PARAMS_KEY) if is_object else None
    if not isinstance(given, dict):
        return {}
    return {key: value for key, value in given.items() if value is not None}


def request_options(custom_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options in a request's ``dllm`` object."""
    given = dllm_object(custom_params)
    others = (CANVAS_KEY, SCORE_KEY, *TOKEN_KEYS, *Watching.model_fields)
    return {key: given[key] for key in given if key not in others}


def watching_of(custom_params: Mapping[str, Any] | None) -> Watching:
    """The keys of the ``dllm`` object that ask to watch the denoising.

    Raises:
        OptionError: a wrong type or value.
    """
    given = dllm_object(custom_params)
    asked = {key: given[key] for key in Watching.model_fields if key in given}
    return parse_options(Watching, asked)


def given_canvas(custom_params: Mapping[str, Any] | None) -> CanvasParts | None:
    """The answer of a request that gives a part of it, as ``serving`` resolved it.

    Raises:
        OptionError: it is not resolved.
    """
    parts = dllm_object(custom_params).get(CANVAS_KEY)
    if parts is None:
        return None
    try:
        return CanvasParts.of(parts)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise OptionError(CANVAS_KEY, parts, "ids and masks") from None


def _refuse_unknown(
    algorithm: Algorithm[Any, Any], options: Mapping[str, Any], known: list[str]
) -> None:
    for key, value in options.items():
        if key in known:
            continue
        if key in CACHE_READERS:
            reader = CACHE_READERS[key]
            raise OptionError(key, value, f"nothing, unless cache is {reader}")
        if key in LENGTH_READERS:
            rules = " or ".join(LENGTH_READERS[key])
            raise OptionError(key, value, f"nothing, unless length is {rules}")
        raise OptionError(
            key,
            value,
            f"a key that {algorithm.name} uses on this model: {', '.join(known)}",
        )


def _check_resizable(
    algorithm: Algorithm[Any, Any],
    options: Options,
    length: LengthRule[Any],
    own_keys: list[str],
) -> None:
    """Refuse a length that changes where the algorithm could not go on."""
    if "block_size" not in own_keys:
        expected = f"fixed: {algorithm.name} decodes no blocks on this model"
        raise OptionError("length", length.name, expected)
    steps = getattr(options, "steps", None)
    if steps is not None and not length.by_units:
        raise OptionError("steps", steps, f"nothing, with length {length.name}")


def _one_of(names: Mapping[str, Any]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def parse_options(model: type[ModelT], options: Mapping[str, Any]) -> ModelT:
    """Options by their class.

    Raises:
        OptionError: a wrong type or value, or too many of those that exclude each
            other.
    """
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            exclusive: tuple[str, ...] = getattr(model, "mutually_exclusive", ())
            keys = exclusive or tuple(options)
            given = {key: options.get(key) for key in keys}
            wanted = "one of them" if exclusive else first["msg"]
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
