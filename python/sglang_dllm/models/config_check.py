"""Checks a config.json against the table of its family, in the launching process."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from transformers import PretrainedConfig

from sglang_dllm.errors import ConfigError
from sglang_dllm.models import rope
from sglang_dllm.models.config_fields import KINDS, TABLES, Fields, Only, Read, Table

logger = logging.getLogger(__name__)

# Fields that other modules of ours or SGLang itself reads and checks.
_READ_ELSEWHERE = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "mask_token_id",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "quantization_config",
    "compression_config",
    *rope.FIELDS,
}


def with_defaults(fields: Fields, architecture: str) -> dict[str, Any]:
    """The fields with the defaults of those that are missing or null."""
    filled = {name: value for name, value in fields.items() if value is not None}
    for name, rule in TABLES[architecture].rules.items():
        if isinstance(rule, Read) and name not in filled:
            default = rule.default
            filled[name] = default(filled) if callable(default) else default
    return filled


def rope_of(fields: Fields, architecture: str) -> rope.Rope:
    """The rotary embedding that the fields describe.

    Raises:
        ConfigError: as ``rope.read_rope``.
    """
    table = TABLES[architecture]
    positions = with_defaults(fields, architecture)[table.positions]
    return rope.read_rope(fields, table.theta, positions, table.rope_kinds)


def check_config(fields: Fields, architecture: str) -> None:
    """Refuse a config.json that our module would compute wrongly.

    Args:
        fields: as the file has them, with ``--json-model-override-args`` applied.

    Raises:
        ConfigError: one line with the field, its value and what is expected.
    """
    table = TABLES[architecture]
    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("model_type") not in table.model_types:
        kind = given.get("model_type")
        raise _refused("model_type", kind, architecture, _either(table.model_types))
    quantization = given.get("quantization_config", {"quant_method": ""})
    if not isinstance(quantization, Mapping) or "quant_method" not in quantization:
        expected = "an object with quant_method"
        raise _refused("quantization_config", quantization, architecture, expected)
    _check_needed(given, table)
    rules = [(given[n], n, rule) for n, rule in table.rules.items() if n in given]
    for value, name, rule in rules:
        if isinstance(rule, Read):
            expected, is_right = KINDS[rule.kind]
            if not is_right(value):
                raise _refused(name, value, architecture, expected)
    full = with_defaults(given, architecture)
    _check_sizes(full, table, architecture)
    for value, name, rule in rules:
        if isinstance(rule, Only):
            allowed = [x(full) if callable(x) else x for x in rule.values]
            if value not in allowed:
                raise _refused(name, value, architecture, _either(allowed))
    rope_of(given, architecture)
    unknown = given.keys() - table.rules.keys() - _READ_ELSEWHERE - _base_fields()
    if unknown:
        logger.info("config.json: no code reads %s", ", ".join(sorted(unknown)))


def _check_needed(given: dict[str, Any], table: Table) -> None:
    for name, rule in table.rules.items():
        if isinstance(rule, Read) and rule.is_needed and name not in given:
            raise ConfigError(
                f"config.json: {name} is missing; expected {KINDS[rule.kind][0]}"
            )
    if table.needs_theta:
        rope.read_rope(given, None, given[table.positions], table.rope_kinds)


def _check_sizes(full: dict[str, Any], table: Table, architecture: str) -> None:
    """Sizes that fit each other. Otherwise the loading of the weights would end."""
    hidden, heads = full[table.hidden], full[table.heads]
    kv_heads = full[table.kv_heads]
    is_free = isinstance(table.rules.get("head_dim"), Read)
    if not is_free and hidden % heads:
        expected = f"a divisor of {table.hidden}={hidden}"
        raise _refused(table.heads, heads, architecture, expected)
    if (full["head_dim"] if is_free else hidden // heads) % 2:
        raise _refused(table.heads, heads, architecture, "heads of an even size")
    if heads % kv_heads:
        expected = f"a divisor of {table.heads}={heads}"
        raise _refused(table.kv_heads, kv_heads, architecture, expected)
    one_kv_head = full.get("multi_query_attention")
    if one_kv_head is not None and kv_heads != (1 if one_kv_head else heads):
        raise _refused(
            "multi_query_attention",
            one_kv_head,
            architecture,
            f"null, or what {table.kv_heads}={kv_heads} says",
        )
    for small, large in (
        ("vocab_size", "embedding_size"),
        ("num_experts_per_tok", "num_experts"),
    ):
        if full.get(small, 0) > full.get(large, full.get(small, 0)):
            expected = f"up to {large}={full[large]}"
            raise _refused(small, full[small], architecture, expected)


@cache
def _base_fields() -> frozenset[str]:
    """The fields of every config of transformers. Our modules compute none of them."""
    return frozenset(PretrainedConfig().to_dict())


def _either(values: Iterable[Any]) -> str:
    shown = ["null" if value is None else repr(value) for value in values]
    return " or ".join(dict.fromkeys(shown))


def _refused(name: str, value: Any, architecture: str, expected: str) -> ConfigError:
    return ConfigError(
        f"config.json: {name}={rope.short(value)} is not supported for {architecture}; "
        f"expected {expected}"
    )
