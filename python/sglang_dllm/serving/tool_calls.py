"""Tool calls that a request forces, so that its answer is one call and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_dllm.serving.bad_request import BadRequest, refused

_FIELD = "tool_choice"
_FUNCTION = {"type": "function", "function": {"name": "…"}}
_ANTHROPIC = ("auto", "any", "tool", "none")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def is_forced(choice: Any) -> bool:
    """True if a ``tool_choice`` of OpenAI's or of Anthropic's asks for a call."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind not in (None, "auto", "none")


def check_choice(
    body: Mapping[str, Any], forms: Sequence[str], *, has_parser: bool
) -> None:
    """Check a choice of chat or of /v1/messages.

    Args:
        forms: the fields of the body that ask for a form of the answer.
        has_parser: whether the server has a --tool-call-parser.

    Raises:
        BadRequest: naming field, value and range.
    """
    choice = body.get(_FIELD)
    _check_function(choice)
    if not is_forced(choice):
        return
    if not body.get("tools"):
        raise refused(_FIELD, choice, "it with tools")
    if not has_parser:
        without = "auto or none on a server without --tool-call-parser"
        raise refused(_FIELD, choice, without)
    if forms:
        raise BadRequest(f"{_FIELD}, {', '.join(forms)}: expected one of them")


def _check_function(choice: Any) -> None:
    """Refuse a choice of OpenAI's that names no function. SGLang checks Anthropic's."""
    if isinstance(choice, dict) and choice.get("type") not in _ANTHROPIC:
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise refused(_FIELD, choice, f"auto, none, required or {_FUNCTION}")


def forced_schemas(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas of the arguments that a body's forced call may have, by field.

    Args:
        body: of any route, with tools of OpenAI's or of Anthropic's.
    """
    choice = body.get(_FIELD)
    if not is_forced(choice):
        return
    tools = body.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        field, function, key = f"tools[{i}].", tool, "input_schema"
        if isinstance(tool.get("function"), dict):
            field, function, key = f"{field}function.", tool["function"], "parameters"
        is_named = _named(choice) in (None, function.get("name"))
        if is_named and isinstance(function.get(key), dict):
            yield field + key, function[key]


def _named(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return None
    function = choice.get("function")
    return (function if isinstance(function, dict) else choice).get("name")


def forced_call(parser: Any, tools: Sequence[Any], choice: Any) -> tuple[str, Any]:
    """The constraint of a forced call, as SGLang hands one to its sampling parameters.

    SGLang's own tag lets a named function be another one, takes any arguments of a
    function that is not strict, and ends in free text. This one is one call of a
    function that may be called, in the words of the parser, with arguments of the
    function's schema.

    Args:
        parser: the name of the server's --tool-call-parser.
        tools: SGLang's, at least one.
        choice: ``required``, or SGLang's record of a function.

    Raises:
        BadRequest: the parser reads no calls of such words.
    """
    from sglang.srt.entrypoints.openai.protocol import LegacyStructuralTagResponseFormat
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    detector: Any = FunctionCallParser.ToolCallParserEnum.get(parser)
    called = [
        tool.function
        for tool in tools
        if choice == "required" or tool.function.name == choice.function.name
    ]
    try:
        words = _words(detector())
        around = [words(function.name) for function in called]
    except (NotImplementedError, TypeError):
        expected = f"auto or none with --tool-call-parser {parser}"
        raise refused(_FIELD, _shown(choice), expected) from None
    structures = [
        {
            "begin": info.begin,
            "schema": function.parameters or _NO_ARGUMENTS,
            "end": info.end,
        }
        for function, info in zip(called, around, strict=True)
    ]
    tag = LegacyStructuralTagResponseFormat(
        type="structural_tag",
        structures=structures,
        triggers=sorted({info.trigger for info in around}),
        at_least_one=True,
    )
    return "structural_tag", tag


def _words(detector: Any) -> Any:
    """From the name of a function to the texts around its arguments."""
    has_own_grammar = detector.get_structural_tag_name() is not None
    if has_own_grammar or not detector.supports_structural_tag():
        raise NotImplementedError
    return detector.structure_info()


def _shown(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.function.name
