"""The rotary embedding of a checkpoint, as its config.json says it.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 writes
``rope_parameters`` with the theta inside, and old files call ``rope_type`` ``type``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dllm.errors import ConfigError

_ORIGINAL = "original_max_position_embeddings"
_PLACES = ("rope_parameters", "rope_scaling")
FIELDS = ("rope_theta", *_PLACES)
"""The fields of config.json that this module reads."""

# The keys of each type, and whether the type needs them. SGLang computes these types as
# transformers' ROPE_INIT_FUNCTIONS does.
_KEYS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": False,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
    },
}
ALL_TYPES = tuple(_KEYS)
_EVERY_KEY = {key for keys in _KEYS.values() for key in keys}
# Notes of training tools, without an effect on the angles.
_NOTES = {"finetuned", "max_position_embeddings"}
_NEUTRAL = {"partial_rotary_factor": 1, "truncate": True}


@dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotary embedding.

    Attributes:
        theta: the base.
        kind: one of ``ALL_TYPES``.
        scaling: the numbers of the type under transformers' names, with the defaults
            that depend on other fields filled in.
    """

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As transformers 5 writes it."""
        return {"rope_type": self.kind, "rope_theta": self.theta, **dict(self.scaling)}

    def for_sglang(self) -> dict[str, Any] | None:
        """The argument ``rope_scaling`` of SGLang's ``get_rope``."""
        if self.kind == "default":
            return None
        numbers = dict(self.scaling)
        wanted = numbers.pop("attention_factor", None)
        if wanted is not None:
            # SGLang multiplies its own factor; transformers replaces it.
            for key in ("mscale", "mscale_all_dim"):
                numbers.pop(key, None)
            factor = numbers["factor"]
            own = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
            numbers["attn_factor"] = wanted / own
        return {"rope_type": self.kind, **numbers}


def read_rope(
    fields: Mapping[str, Any],
    default_theta: float | None,
    max_positions: int,
    kinds: tuple[str, ...] = ALL_TYPES,
) -> Rope:
    """Read the rotary embedding from the fields of a config.json.

    Args:
        default_theta: the published default where no field has the base; None where
            the base must be there.
        max_positions: the published default of ``original_max_position_embeddings``.
        kinds: the types that the published code of this family computes.

    Raises:
        ConfigError: a type, key or value that is not supported, is malformed, or says
            another thing than another field.
    """
    given: dict[str, Any] = {}
    for place in _PLACES:
        value = fields.get(place)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise _refused(place, value, "an object or null")
        for key, item in value.items():
            if item is not None:
                name = "rope_type" if key == "type" else key
                _join(given, name, item, f"{place}.{key}")
    if fields.get("rope_theta") is not None:
        _join(given, "rope_theta", fields["rope_theta"], "rope_theta")
    theta = _number("rope_theta", given.pop("rope_theta", default_theta))
    if theta <= 1:
        raise _refused("rope_theta", theta, "a number above 1")
    kind = given.pop("rope_type", "default")
    if kind not in kinds:
        raise _refused("rope_scaling.rope_type", kind, " or ".join(map(repr, kinds)))
    return Rope(theta, kind, tuple(_scaling(kind, given, max_positions).items()))


def _join(given: dict[str, Any], name: str, value: Any, field: str) -> None:
    found = given.setdefault(name, value)
    # NaN is no number, which is said later.
    if found is not value and found != value:
        raise _refused(field, value, f"{given[name]!r}, as another field says")


def _scaling(kind: str, given: dict[str, Any], max_positions: int) -> dict[str, float]:
    for key, value in given.items():
        # transformers ignores the keys of another type.
        if key in _EVERY_KEY or key in _NOTES:
            continue
        if key not in _NEUTRAL:
            raise _refused(f"rope_scaling.{key}", value, "no such key")
        if value != _NEUTRAL[key]:
            raise _refused(f"rope_scaling.{key}", value, repr(_NEUTRAL[key]))
    numbers = {}
    for key, is_needed in _KEYS[kind].items():
        if key in given:
            number = _number(f"rope_scaling.{key}", given[key])
            numbers[key] = int(number) if key == _ORIGINAL else number
        elif key == _ORIGINAL:
            numbers[key] = max_positions
        elif is_needed:
            raise ConfigError(
                f"config.json: rope_scaling.{key} is missing; expected a number above "
                f"0 for rope_type={kind!r}"
            )
    if numbers.get("factor", 1) < 1:
        raise _refused("rope_scaling.factor", numbers["factor"], "a number from 1")
    if kind == "yarn" and numbers["factor"] * numbers[_ORIGINAL] < max_positions:
        # SGLang's angles end there.
        expected = f"at least {max_positions / numbers[_ORIGINAL]:g}"
        raise _refused("rope_scaling.factor", numbers["factor"], expected)
    low, high = (numbers.get(f"{end}_freq_factor", 0) for end in ("low", "high"))
    if kind == "llama3" and low >= high:
        raise _refused("rope_scaling.low_freq_factor", low, f"a number below {high}")
    return numbers


def _number(field: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e18:
        raise _refused(field, value, "a number above 0")
    return float(value)


def _refused(field: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"config.json: {field}={short(value)} is not supported; expected {expected}"
    )


def short(value: Any) -> str:
    """A value of a file, for a line of the log."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
