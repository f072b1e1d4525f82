"""The door: requests are checked here, before they are queued.

Every refusal is a ``RequestError`` that names the field, the value and what is
allowed; SGLang's HTTP layer answers it with status 400. The door sees requests of
every route and of the Python engine; ``body`` sees JSON only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dllm.config.resolve import (
    CUSTOM_PARAMS_KEY,
    DEFAULT_MAX_NEW_TOKENS,
    DecodeConfig,
    Decoding,
    request_options,
)
from sglang_dllm.errors import OptionError
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.fields import check_token_ids

_OPTIONS = f"custom_params.{CUSTOM_PARAMS_KEY}"

# What SGLang's scheduler keeps back of the context or of the KV pool, in tokens.
_KEPT_OF_PROMPT = 5


@dataclass(frozen=True)
class CapacityLimits:
    """What the scheduler holds of one request.

    Attributes:
        max_req_input_len: the scheduler's own limit; a prompt is shorter.
        page_size: tokens of a KV page.
        max_rows: rows of a forward batch (--max-running-requests); 1 where two rows
            cannot share KV slots.
        max_round_tokens: tokens of a forward batch (--max-prefill-tokens).
    """

    max_req_input_len: int
    page_size: int = 1
    max_rows: int = 2
    max_round_tokens: int = 2**31 - 1

    @property
    def max_prompt_len(self) -> int:
        return self.max_req_input_len - 1

    def for_answer(self, prompt_len: int) -> int:
        """Longest answer that the scheduler does not shorten.

        Mirrors sglang 0.5.17 ``Scheduler.init_req_max_new_tokens`` for a pool as
        small as the limit allows: with pages of one token the two are equal, with
        larger ones this is at most two pages less.
        """
        pages = -(-prompt_len // self.page_size)
        held = self.max_req_input_len + _KEPT_OF_PROMPT
        return held - (pages + 1) * self.page_size


def check_request(
    params: dict[str, Any],
    input_ids: Sequence[int] | None,
    vocab_size: int,
    room: CapacityLimits,
    decode: DecodeConfig,
) -> None:
    """Refuse a prompt or an answer length that no canvas can hold, or wrong options.

    ``params['max_new_tokens']`` is filled in where the request names none.

    Args:
        params: the request's sampling parameters, changed in place.
        input_ids: the prompt.
        vocab_size: ids from 0 to vocab_size - 1 exist.
        room: what a canvas can hold.
        decode: the server's part of how the request is decoded.

    Raises:
        BadRequest: with field, value and range.
    """
    if not input_ids:
        raise BadRequest("input_ids: the prompt is empty; expected at least 1 token")
    check_token_ids("input_ids", list(input_ids), vocab_size)
    prompt_len = len(input_ids)
    if prompt_len > room.max_prompt_len:
        raise BadRequest(
            f"input_ids: the prompt has {prompt_len} tokens; "
            f"expected 1 to {room.max_prompt_len}"
        )
    most = room.for_answer(prompt_len)
    max_new_tokens = params.get("max_new_tokens")
    if max_new_tokens is None:
        max_new_tokens = params["max_new_tokens"] = min(DEFAULT_MAX_NEW_TOKENS, most)
    if not 1 <= max_new_tokens <= most:
        raise BadRequest(
            f"max_new_tokens={max_new_tokens} does not fit: with a prompt of "
            f"{prompt_len} tokens, max_tokens can be 1 to {most}"
        )
    decoding = _check_options(params.get("custom_params"), decode, max_new_tokens)
    delimiter_ids = getattr(decoding.options, "delimiter_ids", None) or []
    check_token_ids(f"{_OPTIONS}.delimiter_ids", delimiter_ids, vocab_size)
    if decoding.algorithm.is_guided(decoding.options):
        _check_second_row(decoding, prompt_len + max_new_tokens, room)


def _check_options(
    custom_params: dict[str, Any] | None, decode: DecodeConfig, answer_len: int
) -> Decoding:
    """Refuse options that the request cannot be decoded with."""
    for key, value in (custom_params or {}).items():
        if key != CUSTOM_PARAMS_KEY:
            raise refused(f"custom_params.{key}", value, f"{_OPTIONS} only")
        if value is not None and not isinstance(value, dict):
            raise refused(_OPTIONS, value, "an object")
    try:
        return decode.resolve(request_options(custom_params), answer_len)
    except OptionError as error:
        field = f"{_OPTIONS}.{error.key}"
        if error.key not in request_options(custom_params) and " " not in error.key:
            field += " (the server's default)"
        raise refused(field, error.value, error.expected) from None


def _check_second_row(
    decoding: Decoding, canvas_len: int, room: CapacityLimits
) -> None:
    """Refuse guidance where the unconditional canvas does not fit beside its own."""
    field = f"{_OPTIONS}.cfg_scale"
    value = decoding.to_dict().get("cfg_scale", decoding.algorithm.name)
    if room.max_rows < 2:
        raise refused(
            field,
            value,
            "0 on a server with --max-running-requests 1 or "
            "--enable-deterministic-inference",
        )
    # SGLang's buffers for a forward are as large as the pool, which may be no larger
    # than the longest request.
    most = min(room.max_round_tokens, room.max_req_input_len + _KEPT_OF_PROMPT) // 2
    if canvas_len > most:
        raise refused(
            field,
            value,
            f"0 with a canvas of {canvas_len} tokens: guidance computes two, which "
            f"can have up to {most} each",
        )


def default_temperature(
    preferred: Mapping[str, Any] | None, generation_config: Mapping[str, Any]
) -> float:
    """Temperature of a request that names none.

    Greedy, as the published samplers of these models, unless
    --preferred-sampling-params or the checkpoint's generation_config.json says
    otherwise.
    """
    for source in (preferred or {}, generation_config):
        if source.get("temperature") is not None:
            return float(source["temperature"])
    return 0.0
