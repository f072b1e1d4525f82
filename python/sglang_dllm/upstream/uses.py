"""Every use that our code makes of SGLang, read from the code's syntax tree.

A use is one line of text: an imported name, an attribute of a class, or a call.

    sglang.srt.managers.schedule_batch:Req
    sglang.srt.managers.schedule_batch:Req.rid
    sglang.srt.mem_cache.allocation:alloc_req_slots(_, _, _)

A call shows how many arguments are passed by position and which by name.
``getattr`` with a default, and names that ``hasattr`` asks for, are no uses.
"""

from __future__ import annotations

import ast
from collections import ChainMap
from collections.abc import Iterator
from itertools import chain

from sglang_dllm.upstream.code import FUNCTIONS, Code, pairs
from sglang_dllm.upstream.objects import (
    CALLED_BY_SGLANG,
    CLASSES,
    FIELDS,
    NAMES,
    NAMES_IN,
    OURS,
)

Kinds = tuple[str, ...]
"""Classes that an object may have: ``module:Name``, ``ours:Name`` for a subclass of
ours, and a ``[`` before it where the object is a sequence of them."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SEQUENCES = ("Collection", "Iterable", "Sequence", "list", "tuple")


def kinds_of(names: str) -> Kinds:
    """From the notation of the tables to kinds."""
    return tuple(
        "[" * name.count("[") + f"{CLASSES[name.strip('[')]}:{name.strip('[')}"
        for name in names.split()
    )


class Reader:
    """Iterates over the uses of one file."""

    def __init__(self, code: Code, name: str, tree: ast.Module) -> None:
        self.code, self.tree = code, tree
        self.table = {
            key: kinds_of(names)
            for key, names in {**NAMES, **NAMES_IN.get(name, {})}.items()
        }
        self.imported: dict[str, str] = {}
        self.results: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(module)) if _is_sglang(module):
                    for alias in node.names:
                        name = alias.asname or alias.name
                        self.imported[name] = f"{module}:{alias.name}"
                case ast.ImportFrom(names=names):
                    # A module of ours may be named like an object of SGLang's.
                    self.table |= {alias.asname or alias.name: () for alias in names}
                case ast.FunctionDef(name=name, returns=ast.expr() as returns):
                    self.results[name] = returns
        self.klass: str | None = None

    def __iter__(self) -> Iterator[str]:
        yield from self.visit(self.tree, ChainMap())

    def visit(self, node: ast.AST, env: ChainMap[str, Kinds]) -> Iterator[str]:
        """The uses in a node. ``env`` has the kinds of parameters and variables."""
        match node:
            case ast.ImportFrom(module=str(module)) if _is_sglang(module):
                yield from (f"{module}:{alias.name}" for alias in node.names)
            case ast.ClassDef(name=name):
                outer, self.klass = self.klass, name
                yield from self.replaced_methods(node)
                yield from self.children(node, env)
                self.klass = outer
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from self.children(node, env.new_child(self.parameters(node)))
            case ast.Call():
                yield from self.call(node, env)
            case ast.Attribute():
                yield from self.attribute(node, env)
                yield from self.visit(node.value, env)
            case ast.Assign() | ast.AnnAssign():
                yield from self.children(node, env)
                self.bind(node, env)
            case ast.For(target=target, iter=iterable):
                yield from self.visit(iterable, env)
                self.bind_element(target, iterable, env)
                yield from chain.from_iterable(self.visit(s, env) for s in node.body)
            case _ if isinstance(node, _COMPREHENSIONS):
                env = env.new_child()
                for part in node.generators:
                    yield from self.visit(part.iter, env)
                    self.bind_element(part.target, part.iter, env)
                yield from self.children(node, env)
            case _:
                yield from self.children(node, env)

    def children(self, node: ast.AST, env: ChainMap[str, Kinds]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            yield from self.visit(child, env)

    def call(self, node: ast.Call, env: ChainMap[str, Kinds]) -> Iterator[str]:
        arguments = _arguments(node)
        match node.func, node.args:
            case ast.Name(id="getattr"), [value, ast.Constant(value=str(name))]:
                yield from self.members(self.kinds(value, env), name)
            case ast.Name(id=name), _ if name in self.imported:
                yield f"{self.imported[name]}{arguments}"
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name), _:
                yield from self.members(self.bases(self.klass), name, arguments)
            case ast.Attribute(value=value, attr=name), _:
                yield from self.attribute(node.func, env, arguments)
                yield from self.visit(value, env)
            case _:
                yield from self.visit(node.func, env)
        # A module of torch is called like a function and runs its ``forward``.
        match node.func:
            case ast.Attribute(value=ast.Name(id="self")):
                yield from self.members(
                    self.kinds(node.func, env), "forward", arguments
                )
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from self.visit(argument, env)

    def attribute(
        self, node: ast.Attribute, env: ChainMap[str, Kinds], arguments: str = ""
    ) -> Iterator[str]:
        match node.value:
            case ast.Name(id=name) if name in self.imported and name not in env:
                yield f"{self.imported[name]}.{node.attr}{arguments}"
            case _:
                kinds = self.kinds(node.value, env)
                yield from self.members(kinds, node.attr, arguments)

    def members(self, kinds: Kinds, name: str, arguments: str = "") -> Iterator[str]:
        """The uses of an attribute of objects of these kinds."""
        if name in OURS or (name.startswith("__") and name != "__init__"):
            return
        for kind in kinds:
            where, _, klass = kind.partition(":")
            if where == "ours":
                own = self.code.classes[klass].own
                if name not in own:
                    yield from self.members(self.bases(klass), name, arguments)
            elif not kind.startswith("["):
                yield f"{kind}.{name}{arguments}"

    def replaced_methods(self, node: ast.ClassDef) -> Iterator[str]:
        for method in node.body:
            if (
                isinstance(method, FUNCTIONS)
                and (node.name, method.name) in CALLED_BY_SGLANG
            ):
                places = ["_"] * (len(method.args.args) - 1)
                arguments = f"({', '.join(places)})"
                yield from self.members(self.bases(node.name), method.name, arguments)

    def bases(self, klass: str | None) -> Kinds:
        """The bases of a class of ours that are SGLang's or derive from SGLang's."""
        if klass not in self.code.classes:
            return ()
        found: list[str] = []
        for base in self.code.classes[klass].bases:
            if base in self.imported:
                found.append(self.imported[base])
            elif self.bases(base):
                found.append(f"ours:{base}")
        return tuple(found)

    def kinds(self, node: ast.expr, env: ChainMap[str, Kinds]) -> Kinds:
        """The kinds of an expression; none where it is not SGLang's."""
        match node:
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.Name(id="self" | "cls") if self.bases(self.klass):
                return (f"ours:{self.klass}",)
            case ast.Name(id=name):
                return self.table.get(name, ())
            case ast.Attribute(value=value, attr=name):
                return self.kinds_of_attribute(value, name, env)
            case ast.Call(func=ast.Name(id=name)):
                if name in FIELDS_OF_CALLS:
                    return kinds_of(FIELDS[f"{name}()"])
                if name in self.imported:
                    return (
                        (self.imported[name],) if name.lstrip("_")[0].isupper() else ()
                    )
                return self.annotated(self.results.get(name))
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                found = self.kinds_of_attribute(value, f"{name}()", env)
                match value:
                    case ast.Name(id=klass) if klass in self.imported:
                        found = found or self.fields(self.imported[klass], f"{name}()")
                if not found and _is_self(self.results.get(name)):
                    return self.kinds(value, env)
                return found
            case ast.IfExp(body=body, orelse=orelse):
                return self.kinds(body, env) or self.kinds(orelse, env)
            case ast.BoolOp(values=values):
                return next(filter(None, (self.kinds(v, env) for v in values)), ())
            case ast.Await(value=value) | ast.NamedExpr(value=value):
                return self.kinds(value, env)
            case ast.Subscript(value=value):
                return _elements(self.kinds(value, env))
        return ()

    def kinds_of_attribute(
        self, value: ast.expr, name: str, env: ChainMap[str, Kinds]
    ) -> Kinds:
        kinds = self.kinds(value, env)
        if kinds:
            return tuple(k for kind in kinds for k in self.fields(kind, name))
        match value:
            case ast.Name(id="self") if self.klass in self.code.classes:
                assigned = self.code.classes[self.klass].attributes.get(name)
                found = self.kinds(assigned, ChainMap()) if assigned is not None else ()
                return found or self.table.get(name, ())
        return ()

    def fields(self, kind: str, name: str) -> Kinds:
        where, _, klass = kind.partition(":")
        if where == "ours":
            return tuple(k for b in self.bases(klass) for k in self.fields(b, name))
        known = FIELDS.get(f"{klass}.{name}")
        return kinds_of(known) if known is not None else ()

    def annotated(self, annotation: ast.expr | None) -> Kinds:
        """The kinds that an annotation names."""
        match annotation:
            case ast.Name(id=name) if name in self.imported:
                return (self.imported[name],)
            case ast.Name(id=name) if self.bases(name):
                return (f"ours:{name}",)
            case ast.Constant(value=str(text)):
                return self.annotated(ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, right=right):
                return self.annotated(left) or self.annotated(right)
            case ast.Subscript(value=ast.Name(id=name), slice=element):
                if name in _SEQUENCES:
                    return tuple(f"[{kind}" for kind in self.annotated(element))
        return ()

    def parameters(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    ) -> dict[str, Kinds]:
        found: dict[str, Kinds] = {}
        spec = node.args
        for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs):
            is_any = arg.annotation is None or ast.unparse(arg.annotation) == "Any"
            if arg.arg in ("self", "cls") and arg.arg not in self.table:
                continue
            found[arg.arg] = (
                self.table.get(arg.arg, ())
                if is_any
                else self.annotated(arg.annotation)
            )
        return found

    def bind(self, node: ast.Assign | ast.AnnAssign, env: ChainMap[str, Kinds]) -> None:
        if node.value is None:
            return
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for one, value in pairs(target, node.value):
                kinds = self.kinds(value, env)
                if isinstance(one, ast.Name) and kinds:
                    env[one.id] = kinds

    def bind_element(
        self, target: ast.expr, iterable: ast.expr, env: ChainMap[str, Kinds]
    ) -> None:
        if isinstance(target, ast.Name):
            kinds = _elements(self.kinds(iterable, env))
            env[target.id] = kinds or self.table.get(target.id, ())


FIELDS_OF_CALLS = {name[:-2] for name in FIELDS if name.endswith("()")}


def _elements(kinds: Kinds) -> Kinds:
    return tuple(kind[1:] for kind in kinds if kind.startswith("["))


def _is_self(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Self"


def _is_sglang(module: str) -> bool:
    return module.split(".")[0] == "sglang"


def _arguments(node: ast.Call) -> str:
    """The arguments of a call: ``(_, _, name=, *, **)``."""
    places = ["*" if isinstance(a, ast.Starred) else "_" for a in node.args]
    names = [f"{k.arg}=" if k.arg is not None else "**" for k in node.keywords]
    return f"({', '.join((*places, *sorted(names)))})"
