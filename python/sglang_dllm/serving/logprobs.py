"""The fields that ask for log-probabilities, where one needs another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dllm.serving.bad_request import refused

_LIKELIHOODS = "/v1/score gives likelihoods of a given text"


def check_chat_logprobs(body: Mapping[str, Any]) -> None:
    """Refuse alternatives of log-probabilities that nobody asks for.

    Raises:
        BadRequest: naming field, value and range.
    """
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise refused("top_logprobs", body["top_logprobs"], "it with logprobs=true")


def completion_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """A completion without ``logprobs: false``, which SGLang would read as 0.

    Raises:
        BadRequest: with ``echo``, for the prompt would need some too.
    """
    found = dict(body)
    if found.get("logprobs") is False:
        del found["logprobs"]
    if found.get("logprobs") is not None and found.get("echo"):
        raise refused("echo", True, f"false or nothing with logprobs: {_LIKELIHOODS}")
    return found


def check_native_logprobs(data: Mapping[str, Any]) -> None:
    """Refuse alternatives of log-probabilities that nobody asks for.

    Raises:
        BadRequest: naming field, value and range.
    """
    num_top = data.get("top_logprobs_num")
    if num_top and not data.get("return_logprob"):
        raise refused("top_logprobs_num", num_top, "it with return_logprob=true")


def check_response_logprobs(
    body: Mapping[str, Any], include: str, *, is_served: bool
) -> None:
    """Check the fields of /v1/responses.

    Args:
        include: what a client includes to get log-probabilities.
        is_served: whether this SGLang has a place for them in a response.

    Raises:
        BadRequest: naming field, value and range.
    """
    is_included = include in (body.get("include") or ())
    if is_included and not is_served:
        there = "logprobs=true on /v1/chat/completions"
        raise refused("include", body["include"], f"no {include}: {there}")
    if is_included and body.get("stream"):
        raise refused("include", body["include"], f"no {include} with stream=true")
    if body.get("top_logprobs") and not is_included:
        expected = f"it with include=[{include!r}]"
        raise refused("top_logprobs", body["top_logprobs"], expected)
