"""Finds the places where one module writes an attribute into another module's object.

    python test/helpers/written_attributes.py [FOLDER ...]

prints them and their number, by default for this tree. Only names are compared, as an
object's type is not known without running it: ``x.ids = ...`` counts if ``x`` is not
``self`` and ``ids`` is an attribute of a class of another module of these folders. A
parameter that is annotated with one of our classes counts for that class alone, and so
does a variable that is assigned from a call of the class or of its class method.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "python" / "sglang_dllm", ROOT / "patches")

OBJECTS_OF_LIBRARIES = frozenset(
    {
        *("forward_batch", "obj", "req", "reporter", "running_batch", "scheduler"),
        *("server_args", "tokenizer"),
    }
)
"""Names that a parameter or variable has where it holds an object of SGLang's or of
``tokenizers``. These libraries expect their objects to be written: SGLang keeps the
state of a request in its ``Req``, and hooks change its ``ServerArgs``."""


@dataclass
class Module:
    """The classes of one file, and the attributes that it writes."""

    path: Path
    attributes: dict[str, set[str]] = field(default_factory=dict)
    """By class: annotated fields, names set in its body, and what its methods set."""
    bases: dict[str, list[str]] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)


@dataclass(frozen=True)
class Write:
    line: int
    receiver: str
    attribute: str
    klass: str | None
    """The class of the receiver, where its annotation or its assignment names one."""


def written(node: ast.AST) -> tuple[ast.expr, str] | None:
    """The object and the attribute that this node writes."""
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return node.value, node.attr
    if not (isinstance(node, ast.Call) and len(node.args) > 1):
        return None
    names = {"setattr", "delattr", "object.__setattr__", "object.__delattr__"}
    name = node.args[1]
    if ast.unparse(node.func) not in names or not isinstance(name, ast.Constant):
        return None
    return node.args[0], str(name.value)


def known_classes(function: ast.AST, klass: str | None) -> dict[str, str]:
    """By parameter and variable of a function: the class that the code names for it."""
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return {}
    spec = function.args
    found = {
        arg.arg: ast.unparse(arg.annotation).strip("'\"").split(" | ")[0]
        for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        if arg.annotation is not None
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            maker = node.value.func
            maker = maker.value if isinstance(maker, ast.Attribute) else maker
            name = ast.unparse(maker)
            targets = (t.id for t in node.targets if isinstance(t, ast.Name))
            found |= dict.fromkeys(targets, klass or name if name == "cls" else name)
    return found


def scan(path: Path) -> Module:
    module = Module(path)

    def visit(node: ast.AST, klass: str | None, known: dict[str, str]) -> None:
        if isinstance(node, ast.ClassDef):
            klass = node.name
            module.attributes[klass] = set(class_body(node))
            module.bases[klass] = [ast.unparse(base) for base in node.bases]
        known = known | known_classes(node, klass)
        if found := written(node):
            receiver = ast.unparse(found[0])
            if receiver not in ("self", "cls"):
                of = known.get(receiver)
                write = Write(node.lineno, receiver, found[1], of)  # type: ignore[attr-defined]
                module.writes.append(write)
            elif klass is not None:
                module.attributes[klass].add(found[1])
        for child in ast.iter_child_nodes(node):
            visit(child, klass, known)

    visit(ast.parse(path.read_text(encoding="utf-8")), None, {})
    return module


def class_body(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            continue
        yield from (t.id for t in targets if isinstance(t, ast.Name))


def written_elsewhere(*folders: Path) -> list[str]:
    """``file:line: object.attribute, of Class`` for each attribute that a module of
    ``folders`` writes into an object of another one."""
    modules = [
        scan(file) for folder in folders for file in sorted(folder.rglob("*.py"))
    ]
    owners: dict[str, list[tuple[str, Module]]] = defaultdict(list)
    bases = {name: of for module in modules for name, of in module.bases.items()}
    for module in modules:
        for name, attributes in module.attributes.items():
            for attribute in attributes:
                owners[attribute].append((name, module))

    def with_bases(name: str) -> set[str]:
        return {name}.union(*map(with_bases, bases.get(name, ())))

    found = []
    for module in modules:
        for write in module.writes:
            candidates = owners[write.attribute]
            if write.klass in bases:
                names = with_bases(write.klass)
                candidates = [c for c in candidates if c[0] in names]
            is_ours = candidates and all(owner is not module for _, owner in candidates)
            is_library = write.receiver.rpartition(".")[2] in OBJECTS_OF_LIBRARIES
            if is_ours and not is_library:
                of = " or ".join(sorted({name for name, _ in candidates}))
                place = f"{module.path}:{write.line}"
                found.append(f"{place}: {write.receiver}.{write.attribute}, of {of}")
    return found


if __name__ == "__main__":
    found = written_elsewhere(*(map(Path, sys.argv[1:]) if sys.argv[1:] else FOLDERS))
    print(*found, f"{len(found)} attributes written across modules", sep="\n")
