"""The fields that a request may have, with strict JSON types and ranges.

SGLang's own models accept ``true`` for a number and ``"5"`` for an integer. Its native
sampling parameters are used before they are checked. An error message quotes the
description of a field as the allowed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dllm.config.resolve import expected_of
from sglang_dllm.decoding.reveals import MAX_TOP_LOGPROBS
from sglang_dllm.grammar.forms import MAX_TEXT_LENGTH
from sglang_dllm.serving.bad_request import BadRequest, refused

MAX_COPIES = 128
MAX_PROMPTS = 4096
MAX_STOPS = 32
MAX_STOP_LENGTH = 256
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

_Bool = Annotated[bool, Field(description="true or false")]
_Count = Annotated[
    int, Field(ge=1, le=_INT32_MAX, description=f"an integer, 1 to {_INT32_MAX}")
]
_Copies = Annotated[
    int, Field(ge=1, le=MAX_COPIES, description=f"an integer, 1 to {MAX_COPIES}")
]
_Int64 = Annotated[
    int,
    Field(
        ge=-_INT64_MAX - 1, le=_INT64_MAX, description="an integer, -2**63 to 2**63-1"
    ),
]
_Temperature = Annotated[
    float, Field(ge=0, le=2, allow_inf_nan=False, description="a number, 0 to 2")
]
_TopP = Annotated[
    float,
    Field(gt=0, le=1, allow_inf_nan=False, description="a number above 0, up to 1"),
]
_TopK = Annotated[
    int,
    Field(
        ge=-1,
        le=_INT32_MAX,
        description=f"-1 or 0 (all tokens), or an integer, 1 to {_INT32_MAX}",
    ),
]
_EACH = "of each token at the forward that committed it; they are no chain rule"
_Top = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
_TopLogprobs = Annotated[
    _Top, Field(description=f"an integer, 0 to {MAX_TOP_LOGPROBS}: alternatives")
]
_Logprobs = Annotated[bool, Field(description=f"true or false: {_EACH}")]
_MinP = Annotated[
    float, Field(ge=0, le=1, allow_inf_nan=False, description="a number, 0 to 1")
]
_Least = Annotated[
    int, Field(ge=0, le=_INT32_MAX, description="an integer, 0 to max_tokens")
]
_Str = Annotated[str, Field(description="a string")]
_Name = Annotated[
    str,
    Field(min_length=1, max_length=256, description="a string of 1 to 256 characters"),
]
_Rids = Annotated[
    _Name | list[_Name] | None,
    Field(description="a string of 1 to 256 characters, or one for each prompt"),
]
_Names = Annotated[list[str], Field(description="a list of names")]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Stops = Annotated[
    _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)],
    Field(
        description=f"a string or up to {MAX_STOPS} strings, each of 1 to "
        f"{MAX_STOP_LENGTH} characters"
    ),
]
_Ids = Annotated[list[int], Field(min_length=1)]
_TokenIds = Annotated[_Ids, Field(description="a list of at least 1 token id")]
_StopIds = Annotated[
    list[int], Field(max_length=256, description="a list of up to 256 token ids")
]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)]
_IdLists = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
_Object = Annotated[dict[str, Any], Field(description="an object")]
_Form = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
_LONGEST = f"up to {MAX_TEXT_LENGTH} characters"
_Schema = Annotated[_Form, Field(description=f"a JSON schema as a string, {_LONGEST}")]
_Regex = Annotated[_Form, Field(description=f"a regular expression, {_LONGEST}")]
_Ebnf = Annotated[_Form, Field(description=f"an EBNF, {_LONGEST}")]
_Tag = Annotated[_Form, Field(description=f"a tag as JSON, {_LONGEST}")]
_Messages = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, description="a list of at least 1 message object"),
]
_Tools = Annotated[list[dict[str, Any]], Field(description="a list of tools")]
_ResponseFormat = Annotated[
    dict[str, Any],
    Field(description="an object with type text, json_schema or another form"),
]
_CustomParams = Annotated[
    dict[str, Any], Field(description='an object {"dllm": {...}}')
]


class _Fields(BaseModel):
    # unsupported.py checks the other keys.
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class _Sampling(_Fields):
    """Fields that mean the same on every route."""

    n: _Copies = 1
    temperature: _Temperature = 0
    top_p: _TopP = 1
    top_k: _TopK = -1
    min_p: _MinP = 0
    # token_fields.py checks these three.
    logit_bias: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    stop: _Stops | None = None
    stop_token_ids: _StopIds | None = None
    ignore_eos: _Bool = False
    no_stop_trim: _Bool = False
    skip_special_tokens: _Bool = True
    custom_params: _CustomParams | None = None


class NativeSampling(_Sampling):
    """``sampling_params`` of /generate and of the Python engine."""

    json_schema: _Schema | None = None
    regex: _Regex | None = None
    ebnf: _Ebnf | None = None
    structural_tag: _Tag | None = None
    max_new_tokens: _Count | None = None
    min_new_tokens: _Least = 0
    sampling_seed: _Int64 | None = None
    stream_interval: _Count | None = None
    spaces_between_special_tokens: _Bool = True


class _Request(_Fields):
    """Fields that every route has and that do not concern sampling."""

    stream: _Bool = False
    session_id: _Name | None = None
    routed_dp_rank: _Int64 | None = None


class GenerateFields(_Request):
    """/generate; sampling_params are NativeSampling."""

    text: Annotated[
        _Text | _Texts | None,
        Field(description=f"a non-empty string or a list of up to {MAX_PROMPTS}"),
    ] = None
    input_ids: Annotated[
        _Ids | _IdLists | None,
        Field(description=f"a list of token ids, or up to {MAX_PROMPTS} such lists"),
    ] = None
    sampling_params: Annotated[
        dict[str, Any] | list[dict[str, Any]] | None,
        Field(description="an object, or a list of one for each prompt"),
    ] = None
    rid: _Rids = None
    extra_key: Annotated[
        str | list[str] | None, Field(description="a string, or one for each prompt")
    ] = None
    log_metrics: _Bool = True
    no_logs: _Bool = False
    background: _Bool = False
    return_prompt_token_ids: _Bool = False
    return_logprob: _Logprobs = False
    top_logprobs_num: _TopLogprobs = 0
    logprob_start_len: Annotated[
        Literal[-1],
        Field(description="-1: a prompt has none; /v1/score gives likelihoods"),
    ] = -1
    return_text_in_logprobs: _Bool = False
    require_reasoning: _Bool = False
    conversation_id: _Str | None = None
    routing_key: _Str | None = None


class _StreamOptions(_Fields):
    include_usage: _Bool = False
    continuous_usage_stats: _Bool = False


class _OpenAI(_Request, _Sampling):
    response_format: _ResponseFormat | None = None
    regex: _Regex | None = None
    ebnf: _Ebnf | None = None
    model: _Str = ""
    min_tokens: _Least = 0
    user: _Str | None = None
    seed: _Int64 | None = None
    stream_options: (
        Annotated[
            _StreamOptions,
            Field(description="an object with include_usage: true or false"),
        ]
        | None
    ) = None
    include_stop_str_in_output: _Bool = False
    cache_salt: _Str | None = None
    return_token_ids: _Bool = False
    return_cached_tokens_details: _Bool = False


class CompletionFields(_OpenAI):
    """/v1/completions"""

    prompt: Annotated[
        _Text | _Texts | _Ids | _IdLists,
        Field(description=f"text, token ids, or a list of up to {MAX_PROMPTS} of them"),
    ]
    max_tokens: _Count = 16
    suffix: _Str | None = None
    echo: _Bool = False
    best_of: _Copies | None = None
    logprobs: Annotated[
        Literal[False] | _Top | None,
        Field(
            description=f"an integer, 0 to {MAX_TOP_LOGPROBS}: so many alternatives, "
            f"{_EACH}"
        ),
    ] = None
    rid: _Rids = None
    extra_key: _Str | None = None


class ChatFields(_OpenAI):
    """/v1/chat/completions; messages are MessageFields."""

    messages: _Messages
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: _Logprobs = False
    top_logprobs: _TopLogprobs = 0
    input_ids: _TokenIds | None = None
    rid: _Name | None = None
    extra_key: _Str | None = None
    tools: _Tools = []
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | dict[str, Any],
        Field(description="auto, none, required, or the function to call"),
    ] = "auto"
    continue_final_message: _Bool = False
    parallel_tool_calls: _Bool = True
    separate_reasoning: _Bool = True
    stream_reasoning: _Bool = True
    return_meta_info: _Bool = False
    return_prompt_token_ids: _Bool = False
    chat_template_kwargs: _Object | None = None


class MessageFields(_Fields):
    """One chat message. SGLang checks the parts of its content."""

    role: Annotated[
        str,
        Field(
            pattern="(?i)^(system|user|assistant|developer|tool|function)$",
            description="system, user, assistant, developer, tool or function",
        ),
    ]
    content: Annotated[
        str | list[dict[str, Any]] | None,
        Field(description="a string or a list of text parts"),
    ] = None
    name: _Str | None = None
    tool_call_id: _Str | None = None
    reasoning_content: _Str | None = None
    tool_calls: Annotated[
        list[dict[str, Any]] | None, Field(description="a list of tool calls")
    ] = None


class ResponseFields(_Request):
    """/v1/responses. SGLang checks the items of the input."""

    input: Annotated[
        str | Annotated[list[dict[str, Any]], Field(min_length=1)],
        Field(description="a string or a list of at least 1 input item"),
    ]
    model: _Str = ""
    user: _Str | None = None
    instructions: _Str | None = None
    max_output_tokens: _Count | None = None
    temperature: _Temperature = 0
    top_p: _TopP = 1
    top_k: _TopK = -1
    min_p: _MinP = 0
    stop: _Stops | None = None
    background: _Bool = False
    store: _Bool = True
    previous_response_id: _Name | None = None
    request_id: _Name | None = None
    extra_key: _Str | None = None
    cache_salt: _Str | None = None
    service_tier: _Str | None = None
    metadata: _Object | None = None
    top_logprobs: _TopLogprobs = 0
    include: _Names = []
    max_tool_calls: _Count | None = None
    parallel_tool_calls: _Bool = True
    chat_template_kwargs: _Object | None = None
    stream_options: _Object | None = None


class AnthropicFields(_Request):
    """/v1/messages. SGLang checks the blocks of the messages."""

    messages: _Messages
    model: _Name
    max_tokens: _Count
    system: Annotated[
        str | list[dict[str, Any]] | None,
        Field(description="a string or a list of text blocks"),
    ] = None
    temperature: _Temperature = 0
    top_p: _TopP = 1
    top_k: _TopK = -1
    stop_sequences: Annotated[
        Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None,
        Field(
            description=f"up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH} "
            "characters"
        ),
    ] = None
    metadata: _Object | None = None
    thinking: _Object | None = None
    tools: _Tools = []
    tool_choice: _Object | None = None
    output_config: _Object | None = None
    betas: _Names = []


def check_fields(
    model: type[BaseModel], data: Mapping[str, Any], prefix: str = ""
) -> None:
    """Check the fields that the model has. null is a field left out.

    Raises:
        BadRequest: for the first wrong one.
    """
    given = {key: value for key, value in data.items() if value is not None}
    try:
        model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0])
        expected = expected_of(model, key)
        if key not in given:
            raise BadRequest(f"{prefix}{key} is missing; expected {expected}") from None
        raise refused(prefix + key, given[key], expected) from None


def check_token_ids(field: str, token_ids: list[int], vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        BadRequest: naming the first one.
    """
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise BadRequest(
                f"{field}: token id {token} is outside the vocabulary; "
                f"expected 0 to {vocab_size - 1}"
            )


NAMES = frozenset(
    name
    for model in (
        *(NativeSampling, GenerateFields, CompletionFields, ChatFields),
        *(MessageFields, ResponseFields, AnthropicFields),
    )
    for name in model.model_fields
)
"""The fields of all routes."""
