"""A server with --skip-tokenizer-init takes and gives token ids, not text."""

from __future__ import annotations

from typing import Any

from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.routes import ANSWERED

_NATIVE = "/generate"
_REASON = "this server has no tokenizer (--skip-tokenizer-init)"
_WITHOUT_TEXT = ("/generate", "/api/show")


def refuse_text(path: str, body: Any) -> None:
    """Refuse a request whose prompt, stops or answer would be text.

    Raises:
        BadRequest: naming the field, or the route.
    """
    if path in ANSWERED and path not in _WITHOUT_TEXT:
        raise BadRequest(f"{path}: {_REASON}; expected {_NATIVE} with input_ids")
    if path != _NATIVE or not isinstance(body, dict):
        return
    if body.get("text") is not None:
        raise refused("text", body["text"], f"input_ids: {_REASON}")
    params = body.get("sampling_params")
    for one in params if isinstance(params, list) else [params]:
        if isinstance(one, dict) and one.get("stop"):
            stop = one["stop"]
            raise refused("sampling_params.stop", stop, f"stop_token_ids: {_REASON}")
