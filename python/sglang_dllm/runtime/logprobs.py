"""The log-probabilities of a request, in the fields in which SGLang sends them."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.reveals import MAX_TOP_LOGPROBS
from sglang_dllm.errors import RequestError

_NONE = "expected nothing"
_PROMPT = "expected -1: a prompt has none; /v1/score gives likelihoods"


def begin_logprobs(req: Req, canvas: Canvas, vocab_size: int) -> None:
    """Let the canvas of a request keep what the request asks for.

    Raises:
        RequestError: for what only a model with a chain rule has.
    """
    if not req.return_logprob:
        return
    num_top, asked = req.logprob.top_logprobs_num or 0, req.logprob.token_ids_logprob
    if type(num_top) is not int or not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise RequestError(
            f"top_logprobs_num={num_top!r} is not allowed; "
            f"expected an integer, 0 to {MAX_TOP_LOGPROBS}"
        )
    if asked is not None:
        raise RequestError(f"token_ids_logprob={asked!r} is not allowed; {_NONE}")
    if req.logprob_start_len not in (-1, len(req.origin_input_ids)):
        start = req.logprob_start_len
        raise RequestError(f"logprob_start_len={start!r} is not allowed; {_PROMPT}")
    canvas.reveal(min(num_top, vocab_size - 1))


def add_logprob(req: Req, canvas: Canvas, token: int) -> None:
    """Note the log-probability of the token that the output got last."""
    if canvas.reveals is None:
        return
    value, top_ids, top_values = canvas.reveals.of(len(req.output_ids) - 1, token)
    found = req.logprob
    found.output_token_logprobs_val.append(value)
    found.output_token_logprobs_idx.append(token)
    found.output_top_logprobs_val.append(top_values)
    found.output_top_logprobs_idx.append(top_ids)


def send(scheduler: Any, reqs: list[Req]) -> None:
    """Let SGLang send the new tokens of requests, with their log-probabilities."""
    for req in reqs:
        # SGLang counts an output without a token, as a stream of drafts has, as one
        # that sent a log-probability. The first token of the next one would lose its.
        req.send_output_token_logprobs_offset = req.send_token_offset
    asks = any(req.return_logprob for req in reqs)
    scheduler.output_streamer.stream_output(reqs, asks)
