"""The syntax trees of our files, and the classes in them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class OurClass:
    """One class of our code.

    Attributes:
        bases: its bases by name, which may be classes of ours.
        own: names that it defines itself.
        attributes: the expressions that its methods assign to attributes of ``self``.
    """

    bases: list[str]
    own: set[str]
    attributes: dict[str, ast.expr]

    @classmethod
    def of(cls, node: ast.ClassDef) -> OurClass:
        own: set[str] = set()
        attributes: dict[str, ast.expr] = {}
        for statement in node.body:
            match statement:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    own.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    own.add(name)
                case ast.Assign(targets=[ast.Name(id=name)]):
                    own.add(name)
        for method in node.body:
            if not isinstance(method, FUNCTIONS):
                continue
            for name, value in _assigned_to_self(method):
                attributes.setdefault(name, value)
                if method.name == "__init__":
                    own.add(name)
        return cls([ast.unparse(base) for base in node.bases], own, attributes)


def _assigned_to_self(method: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(method):
        match node:
            case ast.Assign(targets=[target], value=ast.expr() as value):
                pass
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                pass
            case _:
                continue
        for one, part in pairs(target, value):
            match one:
                # A value that is made from itself says nothing of its class.
                case ast.Attribute(value=ast.Name(id="self"), attr=name) if (
                    f"self.{name}" not in ast.unparse(part)
                ):
                    yield name, part


def pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, each with the expression that it gets."""
    match target, value:
        case ast.Tuple(elts=targets), ast.Tuple(elts=values):
            yield from zip(targets, values, strict=False)
        case _:
            yield target, value


@dataclass
class Code:
    """All files of ours, and the classes among them."""

    files: dict[str, ast.Module]
    classes: dict[str, OurClass] = field(default_factory=dict)

    @classmethod
    def of(cls, folders: Mapping[str, Path]) -> Code:
        """
        Args:
            folders: by the prefix that the names of their files get.
        """
        files = {
            prefix + file.relative_to(folder).as_posix(): ast.parse(file.read_text())
            for prefix, folder in folders.items()
            for file in sorted(folder.rglob("*.py"))
        }
        nodes = chain.from_iterable(map(ast.walk, files.values()))
        classes = {n.name: OurClass.of(n) for n in nodes if isinstance(n, ast.ClassDef)}
        return cls(files, classes)
