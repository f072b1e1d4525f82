"""JSON bodies are checked here, before SGLang's own models read them.

The checks need no tokenizer: fields, types, ranges and token ids.
``validation`` checks lengths and options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.best_of import check_best_of
from sglang_dllm.serving.canvas import with_suffix
from sglang_dllm.serving.chat_like import (
    check_anthropic,
    check_count_tokens,
    check_responses,
)
from sglang_dllm.serving.fields import (
    ChatFields,
    CompletionFields,
    GenerateFields,
    MessageFields,
    NativeSampling,
    check_fields,
    check_token_ids,
)
from sglang_dllm.serving.forms import given_forms, with_form, with_own_form
from sglang_dllm.serving.logprobs import (
    check_chat_logprobs,
    check_native_logprobs,
    completion_logprobs,
)
from sglang_dllm.serving.scoring import refuse_score
from sglang_dllm.serving.token_fields import moved_token_fields
from sglang_dllm.serving.tool_calls import check_choice
from sglang_dllm.serving.unsupported import (
    all_tokens,
    defaults_of,
    without_unsupported,
)
from sglang_dllm.serving.validation import check_watching


@dataclass(frozen=True)
class ServedModel:
    """The facts of a model that the checks of a body need.

    Attributes:
        vocab_size: token ids from 0 to vocab_size - 1 exist.
        defaults: the sampling of a request that names none
            (``sampling_defaults.SamplingDefaults``).
        template_names: the words of the chat template, its variables among them.
        has_reasoning: whether the server has a --reasoning-parser.
        has_tool_calls: whether it has a --tool-call-parser.
    """

    vocab_size: int
    defaults: Mapping[str, Any]
    template_names: frozenset[str] = frozenset()
    has_reasoning: bool = False
    has_tool_calls: bool = False


def check_body(path: str, body: Any, model: ServedModel) -> Any:
    """Check a body and fill in the server's sampling defaults.

    Args:
        path: of the route. A route that ``CHECKS`` does not list has no checks.
        body: as it was parsed; it is not changed.

    Returns:
        The body that SGLang reads.

    Raises:
        BadRequest: status 400, naming field, value and range.
    """
    check = CHECKS.get(path)
    return body if check is None else check(_an_object(body), model)


def _an_object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise refused("body", body, "a JSON object")
    return body


def _check_generate(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    return check_generate(body, model.vocab_size)


def _check_responses(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    return check_responses(body, model.defaults)


def _check_anthropic(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    _check_template("tools", body.get("tools"), model)
    return check_anthropic(
        body, model.defaults, model.has_reasoning, model.has_tool_calls
    )


def _check_count_tokens(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    _check_template("tools", body.get("tools"), model)
    return check_count_tokens(body)


def _check_chat(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    body = dict(body)
    adds = body.pop("add_special_tokens", None)
    if adds is not None and adds is not False:
        says = "false or nothing: the chat template writes the special tokens"
        raise refused("add_special_tokens", adds, says)
    body = _check_openai(body, model, ChatFields, ChatCompletionRequest)
    check_chat_logprobs(body)
    for i, message in enumerate(body["messages"]):
        check_fields(MessageFields, message, f"messages[{i}].")
        _check_template(f"messages[{i}].tool_calls", message.get("tool_calls"), model)
    _check_template("tools", body.get("tools"), model)
    check_choice(body, given_forms(body), has_parser=model.has_tool_calls)
    check_token_ids("input_ids", body.get("input_ids", []), model.vocab_size)
    reserved = _template_arguments() & body.get("chat_template_kwargs", {}).keys()
    if reserved:
        name = min(reserved)
        raise refused(
            f"chat_template_kwargs.{name}",
            body["chat_template_kwargs"][name],
            "variables of the chat template only",
        )
    return body


def _check_template(field: str, value: Any, model: ServedModel) -> None:
    """Refuse what the chat template would leave out of the prompt."""
    name = field.rpartition(".")[2]
    if value and name not in model.template_names:
        reason = f"the chat template of this model has no place for {name}"
        raise refused(field, value, f"nothing: {reason}")


@cache
def _template_arguments() -> frozenset[str]:
    """The parameters of apply_chat_template; SGLang would pass such a name twice."""
    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template)
    return frozenset({*arguments.parameters, "messages"})


def _check_completion(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest

    body = _check_openai(body, model, CompletionFields, CompletionRequest)
    check_best_of(body)
    default = CompletionFields.model_fields["max_tokens"].default
    body = with_suffix(completion_logprobs(body), default)
    _check_prompts("prompt", body["prompt"], body, model.vocab_size)
    return body


def _check_openai(
    body: dict[str, Any],
    model: ServedModel,
    implemented: type[BaseModel],
    upstream: type[Any],
) -> dict[str, Any]:
    body = with_own_form(body)
    check_fields(implemented, body)
    check_token_ids(
        "stop_token_ids", body.get("stop_token_ids") or [], model.vocab_size
    )
    defaults = defaults_of(upstream)  # type: ignore[arg-type]
    body = without_unsupported(body, implemented, defaults, unknown_allowed=True)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise refused("stream_options", body["stream_options"], "it with stream=true")
    check_watching(body, is_streamed=bool(body.get("stream")))
    refuse_score(body)
    body = moved_token_fields(with_form(body), model.vocab_size)
    if body.pop("include_stop_str_in_output", False):
        # vLLM's name of it.
        body["no_stop_trim"] = True
    body = {**model.defaults, **all_tokens(body)}
    samples = body.pop("do_sample", None)
    if samples is not None and samples is not (body["temperature"] > 0):
        says = "true with a temperature above 0, false with temperature 0"
        raise refused("do_sample", samples, says)
    return body


def check_generate(data: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Check the fields of a native request, of HTTP or of the Python engine.

    Returns:
        The fields without null and without those that are switched off, in
        ``sampling_params`` too.

    Raises:
        BadRequest: naming field, value and range.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    check_fields(GenerateFields, data)
    for key in NativeSampling.model_fields:
        if data.get(key) is not None:
            raise refused(key, data[key], f"it inside sampling_params: {key!r}")
    known = defaults_of(GenerateReqInput)
    found = without_unsupported(data, GenerateFields, known, unknown_allowed=True)
    check_native_logprobs(found)
    text, input_ids = data.get("text"), data.get("input_ids")
    if (text is None) == (input_ids is None):
        given = "neither" if text is None else "both"
        raise BadRequest(f"text, input_ids: {given} given; expected one of them")
    prompt: Any = input_ids if text is None else text
    _check_prompts("input_ids", prompt, data, vocab_size)
    params = found.get("sampling_params")
    if isinstance(params, dict):
        params = check_sampling(params, vocab_size, "sampling_params.")
    elif params is not None:
        params = [
            check_sampling(one, vocab_size, f"sampling_params[{i}].")
            for i, one in enumerate(params)
        ]
        if len({one.get("n", 1) for one in params}) > 1:
            raise BadRequest(
                "sampling_params: n differs; expected the same n for each prompt"
            )
    if params is None:
        return found
    for one in params if isinstance(params, list) else [params]:
        check_watching(one, is_streamed=bool(data.get("stream")))
        if data.get("stream"):
            refuse_score(one, "with stream=false")
    return {**found, "sampling_params": params}


def check_sampling(
    params: Mapping[str, Any], vocab_size: int, prefix: str
) -> dict[str, Any]:
    """Check native sampling parameters.

    Returns:
        The parameters without null and without those that are switched off.

    Raises:
        BadRequest: naming field, value and range.
    """
    from sglang.srt.sampling.sampling_params import SamplingParams

    check_fields(NativeSampling, params, prefix)
    found = without_unsupported(
        params,
        NativeSampling,
        defaults_of(SamplingParams),
        unknown_allowed=False,
        prefix=prefix,
    )
    stop_ids = params.get("stop_token_ids") or []
    check_token_ids(f"{prefix}stop_token_ids", stop_ids, vocab_size)
    return moved_token_fields(all_tokens(found), vocab_size, prefix)


def _check_prompts(
    field: str, given: Any, data: Mapping[str, Any], vocab_size: int
) -> None:
    """Check token ids, and that lists of one value for each prompt have as many.

    Args:
        given: a prompt or a list of them, each text or token ids.
    """
    is_batch = isinstance(given, list) and not isinstance(given[0], int)
    for prompt in given if is_batch else [given]:
        if isinstance(prompt, list):
            check_token_ids(field, prompt, vocab_size)
    num_prompts = len(given) if is_batch else None
    for key in ("rid", "sampling_params", "extra_key"):
        value = data.get(key)
        if isinstance(value, list) and len(value) != num_prompts:
            raise BadRequest(
                f"{key} has {len(value)} values; expected one for each of "
                + ("a list of prompts" if num_prompts is None else f"{num_prompts}")
            )


def _check_vertex(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    """A list of /generate prompts with common parameters."""
    instances = body.get("instances")
    parameters = body.get("parameters") or {}
    if not isinstance(instances, list):
        raise refused("instances", instances, "a list of objects")
    if not isinstance(parameters, dict):
        raise refused("parameters", parameters, "an object")
    unknown = parameters.keys() - GenerateFields.model_fields.keys()
    for key in ["text", "input_ids", "stream", *sorted(unknown)]:
        if key in parameters:
            known = ", ".join(GenerateFields.model_fields)
            raise refused(f"parameters.{key}", parameters[key], f"one of {known}")
    for instance in instances:
        if not isinstance(instance, dict):
            raise refused("instances", instances, "a list of objects")
        check_generate(instance, model.vocab_size)
    if len({key for each in instances for key in each}) > 1:
        raise BadRequest("instances: expected text in each, or input_ids in each")
    if instances:
        (key,) = instances[0]
        batch = {key: [each[key] for each in instances], **parameters}
        check_generate(batch, model.vocab_size)
    return body


def _check_detokenize(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    tokens = body.get("tokens")
    if isinstance(tokens, list) and tokens:
        for row in tokens if isinstance(tokens[0], list) else [tokens]:
            if isinstance(row, list) and all(type(token) is int for token in row):
                check_token_ids("tokens", row, model.vocab_size)
    return body


CHECKS: dict[str, Callable[[dict[str, Any], ServedModel], dict[str, Any]]] = {
    "/v1/chat/completions": _check_chat,
    "/invocations": _check_chat,
    "/v1/completions": _check_completion,
    "/generate": _check_generate,
    "/v1/messages": _check_anthropic,
    "/v1/messages/count_tokens": _check_count_tokens,
    "/v1/responses": _check_responses,
    "/vertex_generate": _check_vertex,
    "/detokenize": _check_detokenize,
    "/v1/detokenize": _check_detokenize,
}
