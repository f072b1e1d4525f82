"""A request for n answers becomes n requests for one, before SGLang sees it.

SGLang sends n copies of one request: all have its seed, so that all answers are the
same, and none has an id that a client could abort.
"""

from __future__ import annotations

from typing import Any

from sglang_dllm.serving.bad_request import refused
from sglang_dllm.serving.fields import MAX_PROMPTS

_SEEDS = 1 << 64


def unfold_copies(obj: Any, least: int = 1) -> None:
    """Turn a GenerateReqInput with n above 1 into a batch, in place.

    The answers keep SGLang's order: all copies of the first prompt come first. Copy i
    has the seed ``seed + i``, in 64 bits, and the id ``rid_i``. So the first answer is
    that of a request for one.

    Args:
        obj: its fields are checked, and its sampling parameters are a dict for a single
            prompt, otherwise a list of dicts.
        least: so many answers are decoded for each prompt, if n is smaller.

    Raises:
        BadRequest: there are too many answers.
    """
    is_single = isinstance(obj.sampling_params, dict)
    params = [obj.sampling_params] if is_single else obj.sampling_params
    num = max(least, params[0].get("n") or 1)
    if num == 1:
        return
    if num * len(params) > MAX_PROMPTS:
        most = f"at most {MAX_PROMPTS} answers, n for each of {len(params)} prompts"
        raise refused("n", num, most)
    if obj.text is not None:
        obj.text = _each([obj.text] if is_single else obj.text, num)
    else:
        obj.input_ids = _each([obj.input_ids] if is_single else obj.input_ids, num)
    obj.sampling_params = [_copy(one, i) for one in params for i in range(num)]
    if isinstance(obj.rid, list):
        obj.rid = [f"{rid}_{i}" for rid in obj.rid for i in range(num)]
    if isinstance(obj.extra_key, list):
        obj.extra_key = _each(obj.extra_key, num)


def _each(values: list[Any], num: int) -> list[Any]:
    return [value for value in values for _ in range(num)]


def _copy(params: dict[str, Any], index: int) -> dict[str, Any]:
    seed = params.get("sampling_seed")
    if seed is None:
        return {**params, "n": 1}
    # A seed is a signed number of 64 bits.
    seed = (seed + index + _SEEDS // 2) % _SEEDS - _SEEDS // 2
    return {**params, "n": 1, "sampling_seed": seed}
