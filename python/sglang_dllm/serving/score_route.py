"""``/v1/score``: how likely items are behind a query, many in one request.

Each item is a native request with ``dllm.score``, so that all share forwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import HTTPException
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, SCORE_KEY
from sglang_dllm.config.scoring import CONTINUATION
from sglang_dllm.decoding.options import StrictModel
from sglang_dllm.serving.bad_request import BadRequest, error_answer, refused
from sglang_dllm.serving.fields import check_fields, check_token_ids
from sglang_dllm.serving.foreign_fields import NOT_IMPLEMENTED
from sglang_dllm.serving.raw_body import read_body
from sglang_dllm.serving.scoring import SCORE, encode_pair
from sglang_dllm.serving.token_ids_only import refuse_text

if TYPE_CHECKING:
    from sglang_dllm.serving.request_checks import RequestChecks

PATH = "/v1/score"
MAX_SCORES = 4096
"""Scores of one request: items, or items times labels."""

_Ids = Annotated[list[int], Field(min_length=1)]
_Bool = Annotated[bool, Field(description="true or false")]


class ScoreFields(StrictModel):
    """The fields of the route. Others of SGLang's must have its defaults."""

    query: Annotated[str | list[int], Field(description="text, or a list of token ids")]
    items: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SCORES)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_SCORES)],
        Field(
            description=f"text, or a list of up to {MAX_SCORES} texts or lists of "
            "token ids"
        ),
    ]
    label_token_ids: Annotated[
        _Ids | None, Field(description="a list of at least 1 token id")
    ] = None
    apply_softmax: _Bool = False
    item_first: _Bool = False
    is_greedy: _Bool = False
    seed: Annotated[
        int | None,
        Field(ge=-(2**63), lt=2**63, description="an integer, -2**63 to 2**63-1"),
    ] = None
    model: Annotated[str, Field(description="a string")] = ""
    rid: Annotated[
        str | None,
        Field(max_length=256, min_length=1, description="1 to 256 characters"),
    ] = None
    method: Any = None
    num_samples: Any = None
    batch_size: Any = None
    cfg_scale: Any = None


_OF_METHOD = ("method", "num_samples", "batch_size", "cfg_scale")
"""Keys of ``dllm.score``, which are checked there."""


def score_route(checks: RequestChecks) -> Route:
    """The route in the place of SGLang's, which scores autoregressive models."""

    async def answer(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await _scores(checks, request))
        except (ValueError, HTTPException) as error:
            is_refusal = isinstance(error, ValueError)
            status = 400 if is_refusal else error.status_code  # type: ignore[union-attr]
            text = str(error) if is_refusal else str(error.detail)  # type: ignore[union-attr]
            names = text.replace(f"{SCORE}.{CONTINUATION}", "items")
            return error_answer(names.replace(f"{SCORE}.", ""), status)

    return Route(PATH, answer, methods=["POST"])


async def _scores(checks: RequestChecks, request: Request) -> dict[str, Any]:
    body = await read_body(request)
    if checks.manager.tokenizer is None:
        refuse_text(PATH, body)
    asked = _read(body)
    num_items = 1 if isinstance(asked.items, str) else len(asked.items)
    if num_items * len(asked.label_token_ids or [0]) > MAX_SCORES:
        raise refused("items", asked.items, f"at most {MAX_SCORES} scores in a request")
    pairs = _pairs(asked, checks)
    score = {key: getattr(asked, key) for key in _OF_METHOD}
    if asked.label_token_ids is not None:
        score["method"] = score["method"] or "chain"
    found = await _generate(checks, request, asked, pairs, [score] * len(pairs))
    answer: dict[str, Any] = {
        "object": "scoring",
        "model": asked.model or checks.manager.served_model_name,
    }
    sums = [one["score"].get("log_likelihood") for one in found]
    if asked.label_token_ids is not None:
        rows = [iter(sums)] * len(asked.label_token_ids)
        answer["scores"] = [
            _labels(row, asked.apply_softmax) for row in zip(*rows, strict=True)
        ]
    elif score["method"] != "greedy":
        answer["scores"] = sums
        answer["token_scores"] = [
            one["score"]["token_log_likelihoods"] for one in found
        ]
    forwards = [one["num_forwards"] for one in found]
    if asked.is_greedy or score["method"] == "greedy":
        if score["method"] != "greedy":
            greedy = {"method": "greedy", "cfg_scale": asked.cfg_scale}
            found = await _generate(
                checks, request, asked, pairs, [greedy] * len(pairs)
            )
            more = [one["num_forwards"] for one in found]
            forwards = [a + b for a, b in zip(forwards, more, strict=True)]
        answer["is_greedy"] = [one["score"]["is_greedy"] for one in found]
    answer["num_forwards"] = forwards
    num = sum(len(prompt) + len(target) for prompt, target in pairs)
    answer["usage"] = {
        "prompt_tokens": num,
        "completion_tokens": 0,
        "total_tokens": num,
    }
    return answer


def _read(body: Any) -> ScoreFields:
    """The request, with its types checked.

    Raises:
        BadRequest: naming field, value and range.
    """
    from sglang.srt.entrypoints.openai.protocol import ScoringRequest

    if not isinstance(body, dict):
        raise refused("body", body, "a JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    for key in [key for key in given if key not in ScoreFields.model_fields]:
        known = ScoringRequest.model_fields.get(key)
        value = given.pop(key)
        if known is None:
            names = ", ".join(ScoreFields.model_fields)
            raise BadRequest(f"{key} is not a known field; expected one of {names}")
        if value != known.default or isinstance(value, bool) is not isinstance(
            known.default, bool
        ):
            raise refused(key, value, f"nothing: {NOT_IMPLEMENTED}")
    check_fields(ScoreFields, given)
    asked = ScoreFields(**given)
    if asked.apply_softmax and asked.label_token_ids is None:
        raise refused("apply_softmax", True, "it with label_token_ids")
    if asked.label_token_ids is not None and asked.is_greedy:
        raise refused("is_greedy", True, "it without label_token_ids")
    if asked.item_first and asked.label_token_ids is None:
        raise refused("item_first", True, "it with label_token_ids")
    if asked.label_token_ids is not None and asked.method not in (None, "chain"):
        raise refused("method", asked.method, "chain, with label_token_ids")
    return asked


def _pairs(
    asked: ScoreFields, checks: RequestChecks
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each context and of each continuation."""
    tokenizer = checks.manager.tokenizer
    items = [asked.items] if isinstance(asked.items, str) else asked.items
    has_texts = isinstance(asked.query, str)
    for i, item in enumerate(items):
        if isinstance(item, str) is not has_texts or not item:
            kind = "non-empty text" if has_texts else "a list of token ids"
            raise refused(f"items[{i}]", item, f"{kind}, as the query is")
        if isinstance(item, list):
            check_token_ids(f"items[{i}]", list(item), checks.model.vocab_size)
    if not isinstance(asked.query, str):
        check_token_ids("query", asked.query, checks.model.vocab_size)
    labels = asked.label_token_ids
    if labels is not None:
        check_token_ids("label_token_ids", labels, checks.model.vocab_size)
        both: Any = [
            item + asked.query if asked.item_first else asked.query + item  # type: ignore[operator]
            for item in items
        ]
        prompts = [list(tokenizer.encode(one)) if has_texts else one for one in both]
        return [(prompt, [label]) for prompt in prompts for label in labels]
    if isinstance(asked.query, str):
        return [encode_pair(tokenizer, asked.query, str(item)) for item in items]
    if not asked.query:
        raise refused("query", asked.query, "at least 1 token id")
    return [(asked.query, list(item)) for item in items]  # type: ignore[arg-type]


async def _generate(
    checks: RequestChecks,
    request: Request,
    asked: ScoreFields,
    pairs: list[tuple[list[int], list[int]]],
    scores: list[dict[str, Any]],
) -> list[Mapping[str, Any]]:
    """The meta_info of one native request for all pairs."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    params = [
        {
            "sampling_seed": asked.seed,
            "custom_params": {
                CUSTOM_PARAMS_KEY: {SCORE_KEY: {**score, CONTINUATION: target}}
            },
        }
        for score, (_, target) in zip(scores, pairs, strict=True)
    ]
    rids = asked.rid and [f"{asked.rid}_{i}" for i in range(len(pairs))]
    obj = GenerateReqInput(
        input_ids=[list(prompt) for prompt, _ in pairs],
        sampling_params=params,
        rid=rids,
    )
    # Closed at once: a second question of this request has the same ids.
    async with aclosing(checks.manager.generate_request(obj, request)) as answers:
        found = await anext(answers)
    infos = [one["meta_info"] for one in found]
    if any("score" not in info for info in infos):
        raise HTTPException(503, "the request was aborted")
    return infos


def _labels(logprobs: tuple[float | None, ...], softmax: bool) -> list[float]:
    """SGLang's scores of labels: their probabilities, or those among the labels."""
    p = [0.0 if one is None else math.exp(one) for one in logprobs]
    total = sum(p)
    return [one / total for one in p] if softmax and total else p
