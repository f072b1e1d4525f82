"""The contract with SGLang: all that our code uses of it, and whether it is there.

``contract.json`` holds the uses. ``python -m sglang_dllm.patches`` writes it from our
code (``uses``). Nothing of SGLang is run to check a use: an attribute is there if its
class has it, declares it as a field, or sets it on ``self`` in one of its methods.

``always`` lists the uses that every version of SGLang must have. ``one_of`` has the
functions of ``compat``, the one module that knows of several versions: for each of
them, SGLang must have all uses of one of the listed shapes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("contract.json")

_USE = re.compile(
    r"(?P<module>[\w.]+):(?P<name>\w+)(\.(?P<attribute>\w+))?(\((?P<arguments>.*)\))?"
)


@dataclass(frozen=True)
class Contract:
    """
    Attributes:
        always: uses, in the notation of ``uses``.
        one_of: by function of ours, the shapes of which SGLang must have one.
    """

    always: Sequence[str]
    one_of: Mapping[str, Sequence[Sequence[str]]]

    @classmethod
    def load(cls) -> Contract:
        """The contract of the installed package."""
        return cls(**json.loads(FILE.read_text(encoding="utf-8")))

    def to_json(self) -> str:
        data = {"always": self.always, "one_of": self.one_of}
        return json.dumps(data, indent=1, default=list) + "\n"

    def first_broken(self, reads_source: bool = True) -> str | None:
        """One line that names the first symbol SGLang lacks; None where none does.

        Args:
            reads_source: look for attributes that methods set on ``self``, which takes
                half a second. Without it a class that declares no fields is taken to
                have them.
        """
        upstream = Upstream(reads_source)
        for use in self.always:
            if problem := upstream.problem(use):
                return problem
        for function, shapes in self.one_of.items():
            problems = [upstream.first_problem(shape) for shape in shapes]
            if None not in problems:
                reasons = "; ".join(str(problem) for problem in problems)
                return f"SGLang has no shape that {function} knows: {reasons}"
        return None


class Upstream:
    """The installed SGLang. Its source files are parsed once."""

    def __init__(self, reads_source: bool = True) -> None:
        self._reads_source = reads_source
        self._assigned: dict[str, dict[str, set[str]]] = {}

    def first_problem(self, uses: Iterable[str]) -> str | None:
        return next(filter(None, map(self.problem, uses)), None)

    def problem(self, use: str, only_declared: bool = False) -> str | None:
        """One line that says what SGLang lacks of a use; None where it has all.

        ``no USE`` is a use that SGLang must not have, as ``compat`` has asked for it.

        Args:
            only_declared: what a method sets on ``self`` does not count.
        """
        if use.startswith("no "):
            use = use.removeprefix("no ")
            if self.problem(use, only_declared=True) is not None:
                return None
            return f"SGLang has {use.replace(':', '.')}"
        match = _USE.fullmatch(use)
        assert match is not None, use
        module, name, attribute, arguments = match.group(
            "module", "name", "attribute", "arguments"
        )
        symbol = f"{module}.{name}"
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"SGLang has no {symbol} ({error})"
        if attribute is not None:
            symbol += f".{attribute}"
            if not self._has(found, attribute, only_declared):
                return f"SGLang has no {symbol}"
            found = _member(found, attribute)
        if arguments is None or found is None:
            return None
        return _call_problem(symbol, found, arguments)

    def _has(self, owner: Any, name: str, only_declared: bool) -> bool:
        if hasattr(owner, name):
            return True
        if not inspect.isclass(owner):
            return False
        classes = [k for k in owner.__mro__ if k.__module__.startswith("sglang.")]
        if any(name in vars(klass).get("__annotations__", ()) for klass in classes):
            return True
        if only_declared:
            return False
        if any("__getattr__" in vars(klass) for klass in classes):
            return True  # its names are known to a running server only
        if not self._reads_source and not _declares_fields(owner):
            return True
        return any(name in self._assigned_in(klass) for klass in classes)

    def _assigned_in(self, klass: type) -> set[str]:
        """The attributes that the methods of a class set on ``self``."""
        module = klass.__module__
        if module not in self._assigned:
            source = Path(inspect.getfile(sys.modules[module]))
            tree = ast.parse(source.read_text(encoding="utf-8"))
            self._assigned[module] = {
                node.name: set(_set_on_self(node))
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
            }
        return self._assigned[module].get(klass.__name__, set())


def _declares_fields(klass: type) -> bool:
    return hasattr(klass, "__dataclass_fields__") or hasattr(klass, "__struct_fields__")


def _set_on_self(node: ast.ClassDef) -> Iterator[str]:
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def _member(owner: Any, name: str) -> Any:
    """A method as an instance has it; None where no class defines it."""
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, staticmethod | classmethod):
        return getattr(owner, name)
    if inspect.isclass(owner) and inspect.isfunction(found):
        return found.__get__(object())
    return None


def _call_problem(symbol: str, function: Any, arguments: str) -> str | None:
    """One line if a function cannot be called in this way."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a C function does not say what it takes
        return None
    given = [part for part in arguments.split(", ") if part]
    places = [None for part in given if part == "_"]
    names = {part[:-1]: None for part in given if part.endswith("=")}
    is_open = "*" in given or "**" in given
    try:
        (signature.bind_partial if is_open else signature.bind)(*places, **names)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        return f"SGLang's {symbol} takes ({takes}), called with ({arguments}): {error}"
    return None
