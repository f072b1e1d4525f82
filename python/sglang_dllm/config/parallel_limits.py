"""Launches that tensor-parallel ranks cannot serve, refused before a rank starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_dllm.errors import ConfigError

TIMEOUTS = ("SGLANG_REQ_RUNNING_TIMEOUT", "SGLANG_REQ_WAITING_TIMEOUT")
"""Environment variables of SGLang: seconds after which a request is ended."""


def check_tp_size(flags: Any, hf_config: Any) -> None:
    """Refuse a number of ranks that does not divide the model.

    The vocabulary sets no limit: SGLang pads it.

    Args:
        flags: the launch flags.
        hf_config: the checkpoint's config, of any of our architectures.

    Raises:
        ConfigError: one line naming the flag, the field and what is allowed.
    """
    sizes = _sizes(hf_config, flags.ep_size)
    for field, size in sizes.items():
        if not _splits(field, size, flags.tp_size):
            heads = sizes["num_attention_heads"]
            allowed = [
                num
                for num in range(1, heads + 1)
                if all(_splits(name, value, num) for name, value in sizes.items())
            ]
            raise ConfigError(
                f"--tp-size={flags.tp_size} does not fit the checkpoint's "
                f"{field}={size}; expected {_one_of(allowed)}"
            )


def check_timeouts(
    tp_size: int, environ: Mapping[str, str], are_shared: Callable[[], bool]
) -> None:
    """Refuse timeouts of requests where each rank asks its own clock.

    One rank would leave a request out of a forward that the others wait in.

    Args:
        are_shared: whether one rank's clock decides for all.

    Raises:
        ConfigError: one line naming the variable.
    """
    for name in TIMEOUTS:
        if tp_size > 1 and _is_on(environ.get(name, "")) and not are_shared():
            raise ConfigError(
                f"{name}={environ[name]!r} does not work with --tp-size={tp_size}: in "
                "this SGLang each rank asks its own clock; leave it out or take a "
                "newer SGLang"
            )


def _sizes(hf_config: Any, ep_size: int) -> dict[str, int]:
    """The sizes that are split, by their names in Llama's config."""
    sizes = {
        "num_attention_heads": hf_config.num_attention_heads,
        "num_key_value_heads": hf_config.num_key_value_heads,
    }
    experts = getattr(hf_config, "expert_intermediate_size", None)
    if experts is None:
        return {**sizes, "intermediate_size": hf_config.intermediate_size}
    # Expert parallelism splits the experts first, each of them by what is left.
    return {**sizes, "expert_intermediate_size": experts * ep_size}


def _splits(field: str, size: int, num: int) -> bool:
    """True if ``num`` ranks can split a size. Fewer heads than ranks are repeated."""
    if field == "num_key_value_heads" and num > size:
        return num % size == 0
    return size % num == 0


def _one_of(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _is_on(seconds: str) -> bool:
    try:
        return float(seconds) > 0
    except ValueError:
        return False
