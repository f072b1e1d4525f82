"""Tool calls of a given form: forced ones, and those of strict functions.

The answer to a request that forces a call is one call and nothing else. If
the model may choose and a function is strict, text may be around calls, and each call
that begins is a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_dllm.serving.bad_request import BadRequest, refused

_FIELD = "tool_choice"
_FUNCTION = {"type": "function", "function": {"name": "…"}}
_ANTHROPIC = ("auto", "any", "tool", "none")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS = {"type": "object"}
_JSON_CALL = '{"name": "f", "arguments": {}}'


def is_forced(choice: Any) -> bool:
    """True if a ``tool_choice`` of OpenAI's or of Anthropic's asks for a call."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind not in (None, "auto", "none")


def asks_for_calls(choice: Any, functions: Sequence[Any]) -> bool:
    """True if the calls of an answer must have a form.

    Args:
        choice: a ``tool_choice`` of OpenAI's or of Anthropic's, or SGLang's record of a
            function.
        functions: whatever has ``strict`` of each function.
    """
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind != "none" and (is_forced(choice) or any(map(_is_strict, functions)))


def _is_strict(function: Any) -> bool:
    is_dict = isinstance(function, dict)
    return bool(
        function.get("strict") if is_dict else getattr(function, "strict", None)
    )


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
    tools = body.get("tools")
    if not isinstance(tools, list) or not tools:
        raise refused(_FIELD, choice, "it with tools")
    name = _named(choice)
    if name is not None and name not in map(_named, tools):
        raise refused(_FIELD, choice, "the name of one of the tools")
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


def called_schemas(
    body: Mapping[str, Any], *, may_choose: bool
) -> Iterator[tuple[str, Any]]:
    """The schemas that the arguments of a body's calls must satisfy, by field.

    Args:
        body: of any route, with tools of OpenAI's or of Anthropic's.
        may_choose: calls that are not forced are read, so that strict ones count.
    """
    choice, tools = body.get(_FIELD), body.get("tools")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    is_needed = is_forced(choice)
    if not is_needed and (kind == "none" or not may_choose):
        return
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        field, function, key = f"tools[{i}].", tool, "input_schema"
        if isinstance(tool.get("function"), dict):
            field, function, key = f"{field}function.", tool["function"], "parameters"
        is_named = _named(choice) in (None, function.get("name"))
        is_read = is_named if is_needed else _is_strict(function)
        if is_read and isinstance(function.get(key), dict):
            yield field + key, function[key]


def _named(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return None
    function = choice.get("function")
    return (function if isinstance(function, dict) else choice).get("name")


def form_of_calls(
    parser: str, tools: Sequence[Any], choice: Any, *, is_parallel: bool = True
) -> tuple[str, Any]:
    """The constraint of calls, as SGLang hands one to its sampling parameters.

    SGLang's own tag lets a named function be another one, takes any arguments of a
    function that is not strict, and ends in free text. Here, a forced call is
    one call of a function that may be called, in the words of the parser, with
    arguments of the function's schema. If the model may choose, arguments of a function
    that is not strict are any object.

    Args:
        parser: the name of the server's --tool-call-parser.
        tools: SGLang's, at least one.
        choice: ``required``, ``auto``, or SGLang's record of a function.
        is_parallel: several calls may come where the model may choose.

    Raises:
        BadRequest: the parser reads no calls of such words.
    """
    from xgrammar import StructuralTag

    may_choose = choice == "auto"
    called = [
        (i, tool.function)
        for i, tool in enumerate(tools)
        if isinstance(choice, str) or tool.function.name == choice.function.name
    ]
    words = _words(parser, in_text=may_choose)
    if words is None:
        there = f"with --tool-call-parser {parser}"
        if not may_choose:
            raise refused(_FIELD, _shown(choice), f"auto or none {there}")
        strict = next(i for i, function in called if _is_strict(function))
        raise refused(f"tools[{strict}]: strict", True, f"false {there}")
    tags, triggers = [], set()
    for _, function in called:
        around, schema = words(function.name), function.parameters or _NO_ARGUMENTS
        if may_choose and not _is_strict(function):
            schema = _ANY_ARGUMENTS
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"begin": around.begin, "content": content, "end": around.end})
        triggers.add(around.trigger)
    form = {
        "type": "triggered_tags",
        "triggers": sorted(triggers),
        "tags": tags,
        "at_least_one": not may_choose,
        "stop_after_first": not (may_choose and is_parallel),
    }
    found = StructuralTag.model_validate({"type": "structural_tag", "format": form})
    return "structural_tag", found


def _words(parser: str, *, in_text: bool) -> Any:
    """From the name of a function to the texts around its arguments.

    None where calls are no JSON, which SGLang's detectors say in several ways.

    Args:
        in_text: other text may be around a call. A detector that takes JSON for a call
            would then find calls in it that no trigger began.
    """
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    try:
        detector: Any = FunctionCallParser.ToolCallParserEnum[parser]()
        words = detector.structure_info()
    except (NotImplementedError, TypeError, ValueError):
        return None
    has_own_grammar = detector.get_structural_tag_name() is not None
    if has_own_grammar or not detector.supports_structural_tag():
        return None
    return None if in_text and detector.has_tool_call(_JSON_CALL) else words


def _shown(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.function.name
