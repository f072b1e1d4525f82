"""``dllm.score`` of a native request: a continuation to score behind its prompt.

A continuation is text or token ids. Text is tokenized as lm-eval does it
(``encode_pair``): spaces at the end of the context belong to the continuation, whose
tokens are those of the whole text behind the tokens of the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, OPTIONS_PATH, SCORE_KEY
from sglang_dllm.config.scoring import CONTINUATION, Scoring, score_of
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.fields import check_token_ids
from sglang_dllm.serving.validation import CapacityLimits

SCORE = f"{OPTIONS_PATH}.{SCORE_KEY}"
ROUTES = "/generate, or /v1/score instead"

_CONTINUATION = f"{SCORE}.{CONTINUATION}"
_NOTHING = f"nothing beside {SCORE}: no token is drawn"
_KEPT = ("custom_params", "sampling_seed")


def refuse_score(params: Mapping[str, Any], there: str = f"on {ROUTES}") -> None:
    """Refuse a score where an answer has no place for it.

    Args:
        there: the requests that have a place for it.

    Raises:
        BadRequest: naming field, value and range.
    """
    given = score_of(params.get("custom_params"))
    if given is not None:
        raise refused(SCORE, given, f"it {there}")


def prepare_scores(obj: Any, given: Any, tokenizer: Any) -> Any:
    """Tokenize the continuations of a GenerateReqInput, its prompts in place.

    Args:
        given: its sampling parameters, a dict or a list of them.
        tokenizer: of transformers; None where the server has none.

    Returns:
        The parameters with the token ids of the continuations.

    Raises:
        BadRequest: naming field, value and range.
    """
    params = given if isinstance(given, list) else [given]
    scores = [score_of(one.get("custom_params")) for one in params]
    if all(score is None for score in scores):
        return given
    if any(score is None for score in scores):
        raise refused(SCORE, None, "it for each prompt of a request, or for none")
    for one, score in zip(params, scores, strict=True):
        _check_alone(obj, one, score)
    if not any(isinstance(score.get(CONTINUATION), str) for score in scores):
        return given
    if tokenizer is None:
        value = scores[0][CONTINUATION]
        raise refused(_CONTINUATION, value, "token ids: the server has no tokenizer")
    if obj.text is None:
        value = next(
            s[CONTINUATION] for s in scores if isinstance(s[CONTINUATION], str)
        )
        raise refused(_CONTINUATION, value, "token ids behind input_ids")
    texts = [obj.text] if isinstance(obj.text, str) else obj.text
    if not isinstance(given, list):
        params, scores = params * len(texts), scores * len(texts)
    pairs = [_ids(tokenizer, *pair) for pair in zip(texts, scores, strict=True)]
    prompts = [prompt for prompt, _ in pairs]
    made = [
        {**one, "custom_params": {CUSTOM_PARAMS_KEY: {SCORE_KEY: score}}}
        for one, (_, score) in zip(params, pairs, strict=True)
    ]
    is_single = isinstance(obj.text, str)
    obj.input_ids = prompts[0] if is_single else prompts
    obj.text = None
    return made[0] if is_single else made


def _check_alone(obj: Any, params: Mapping[str, Any], score: Any) -> None:
    """Refuse fields that have no effect on a score."""
    if not isinstance(score, dict):
        raise refused(SCORE, score, "an object with a continuation")
    if getattr(obj, "return_logprob", None):
        raise refused("return_logprob", True, _NOTHING)
    for key, value in params.items():
        if key not in _KEPT and value is not None and (key, value) != ("n", 1):
            raise refused(f"sampling_params.{key}", value, _NOTHING)
    options = params["custom_params"][CUSTOM_PARAMS_KEY]
    for key, value in options.items():
        if key != SCORE_KEY and value is not None:
            raise refused(f"{OPTIONS_PATH}.{key}", value, _NOTHING)


def _ids(
    tokenizer: Any, context: str, score: dict[str, Any]
) -> tuple[list[int], dict[str, Any]]:
    continuation = score[CONTINUATION]
    if not isinstance(continuation, str):
        return list(tokenizer.encode(context)), score
    prompt, target = encode_pair(tokenizer, context, continuation)
    return prompt, {**score, CONTINUATION: target}


def encode_pair(
    tokenizer: Any, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The token ids of a context and of the continuation behind it.

    An empty context is the BOS token, or the EOS token of a tokenizer without one.

    Raises:
        BadRequest: the continuation has no token.
    """
    kept = context.rstrip()
    continuation, shown = context[len(kept) :] + continuation, continuation
    if kept:
        prompt = list(tokenizer.encode(kept))
        target = list(tokenizer.encode(kept + continuation))[len(prompt) :]
    else:
        start = tokenizer.bos_token_id
        prompt = [tokenizer.eos_token_id if start is None else start]
        target = list(tokenizer.encode(continuation, add_special_tokens=False))
    if not target or not shown:
        raise refused(_CONTINUATION, shown, "text of at least 1 token")
    return prompt, target


def check_score(
    params: dict[str, Any], input_ids: Any, limits: CapacityLimits, facts: ModelFacts
) -> None:
    """Check a request for a score and fill in what it leaves open, in place.

    Args:
        params: with ``dllm.score``.
        input_ids: the prompt.

    Raises:
        BadRequest: naming field, value and range.
    """
    given = score_of(params["custom_params"])
    continuation = given.get(CONTINUATION)
    is_list = isinstance(continuation, list) and continuation
    if not is_list or any(type(token) is not int for token in continuation):
        raise refused(_CONTINUATION, continuation, "text, or at least 1 token id")
    check_token_ids(_CONTINUATION, continuation, facts.vocab_size)
    if facts.mask_id in continuation:
        text = f"no mask token, whose id is {facts.mask_id}"
        raise refused(_CONTINUATION, continuation, text)
    if not input_ids:
        raise BadRequest("input_ids: the prompt is empty; expected at least 1 token")
    check_token_ids("input_ids", list(input_ids), facts.vocab_size)
    prompt_len, most = len(input_ids), limits.max_answer_len(len(input_ids))
    if prompt_len > limits.max_prompt_len or len(continuation) > most:
        raise BadRequest(
            f"{_CONTINUATION}: {len(continuation)} tokens behind a prompt of "
            f"{prompt_len} do not fit; expected 1 to {max(most, 0)} behind a prompt of "
            f"1 to {limits.max_prompt_len}; {limits.as_clients_say}"
        )
    try:
        scoring = Scoring.of(given, continuation, facts.family)
    except OptionError as error:
        raise refused(f"{SCORE}.{error.key}", error.value, error.expected) from None
    if limits.max_windows < 2 and scoring.options.cfg_scale > 0:
        expected = "0 on a server with --max-running-requests 1"
        raise refused(f"{SCORE}.cfg_scale", scoring.options.cfg_scale, expected)
    params["max_new_tokens"] = len(continuation)
    # The same question has the same answer.
    params["sampling_seed"] = params.get("sampling_seed") or 0
    params["custom_params"] = {CUSTOM_PARAMS_KEY: {SCORE_KEY: scoring.carried()}}
