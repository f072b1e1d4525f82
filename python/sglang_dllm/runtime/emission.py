"""Emission: the committed prefix of a canvas becomes the output of its request."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_LENGTH, BaseFinishReason, Req

from sglang_dllm.runtime.admission import Denoising
from sglang_dllm.runtime.logprobs import add_logprob


class FinishEos(BaseFinishReason):
    """The answer ended: with an EOS, which is not part of the output, or complete."""

    def to_json(self) -> dict[str, Any]:
        # Without a matched token the detokenizer cuts nothing off the output.
        return {"type": "stop", "matched": None}


def emit(req: Req) -> int:
    """Append the tokens that became final to the output, up to the request's end.

    Tokens are appended one by one, so that an EOS, a stop string or a stop token ends
    the request at the first match in canvas order. A round may have committed more
    behind it; that is dropped. An EOS in front of text that the request gave ends
    nothing, nor does another token at which the model ends.

    Returns:
        The number of new tokens.
    """
    state: Denoising = req.dllm_algo_state
    canvas, params = state.canvas, req.sampling_params
    has_text_stops = bool(params.stop_strs or params.stop_regex_strs)
    before = len(req.output_ids)
    ends_from = canvas.prompt_len - canvas.answer_start + canvas.ends_from
    asked = frozenset(params.stop_token_ids or ())
    for token in canvas.take_committed_prefix().tolist():
        may_end = len(req.output_ids) >= ends_from
        if may_end and token in canvas.eos_ids and not params.ignore_eos:
            req.finished_reason = FinishEos()
            break
        req.output_ids.append(token)
        add_logprob(req, canvas, token)
        is_last = len(req.output_ids) >= params.max_new_tokens
        is_stop = token in (state.stop_ids if may_end else asked)
        if is_last or has_text_stops or is_stop:
            _check_end(req, token if is_stop else None)
            if req.finished():
                break
    if canvas.is_complete and not req.finished():
        # The answer ends before its longest length: with given text, or by a rule.
        req.finished_reason = (
            FINISH_LENGTH(length=len(req.output_ids))
            if canvas.is_out_of_forwards and canvas.is_open
            else FinishEos()
        )
    return len(req.output_ids) - before


def is_due(req: Req) -> bool:
    """True if the new tokens of a request are sent at the end of this round.

    A stream gets its first tokens at once, then whenever as many as its interval are
    there: all of them. A round may commit several tokens, so a count that must be a
    multiple of the interval, as in SGLang 0.5.17, would hardly ever be met. A stream of
    drafts is due after each forward, and one with gaps when a gap is final.
    """
    num_new = len(req.output_ids) - req.send_token_offset
    is_first = req.send_token_offset == 0 and num_new > 0
    state: Denoising = req.dllm_algo_state
    if req.finished() or is_first or num_new >= state.stream_interval:
        return True
    return state.report is not None and state.report.has_news


def _check_end(req: Req, stop: int | None) -> None:
    """Apply SGLang's own stop rules: at each token, stops come before the length.

    Args:
        stop: the token, if it may end the request.
    """
    if req._check_str_based_finish(1):
        return
    if stop is not None and req._check_token_based_finish([stop]):
        return
    if len(req.output_ids) >= req.sampling_params.max_new_tokens:
        is_open = req.dllm_algo_state.canvas.is_open
        # An answer whose end the request gave is complete.
        length = FINISH_LENGTH(length=len(req.output_ids))
        req.finished_reason = length if is_open else FinishEos()
