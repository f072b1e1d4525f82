"""The shapes of SGLang that each function of ``compat`` knows.

A function of ``compat`` asks which shape SGLang has and goes one of two ways. Its
questions are calls of ``hasattr``, an import in a ``try``, names of the module that
hold the answer of one, and calls of its functions that return a ``bool``. One answer to
all questions of a function is one shape: the uses on the way that the answers lead to,
and what SGLang has, or has not (``no ...``), by the answers.
"""

from __future__ import annotations

import ast
from collections import ChainMap
from collections.abc import Iterator, Sequence
from itertools import product

from sglang_dllm.upstream.code import Code
from sglang_dllm.upstream.contract import Contract
from sglang_dllm.upstream.uses import Kinds, Reader

COMPAT = "upstream/compat.py"

Shape = frozenset[str]


def contract_of(code: Code) -> Contract:
    """The contract of all files of ours."""
    always = {
        use
        for name, tree in code.files.items()
        if name != COMPAT
        for use in Reader(code, name, tree)
    }
    one_of: dict[str, list[list[str]]] = {}
    if COMPAT in code.files:
        for name, shapes in ShapeReader(code, code.files[COMPAT]).shapes_by_name():
            if len(shapes) == 1:
                always |= shapes[0]
            elif all(shapes):
                # A function that may use nothing, whatever SGLang has, cannot break.
                one_of[name] = sorted(map(sorted, shapes))
    return Contract(sorted(always), dict(sorted(one_of.items())))


class ShapeReader(Reader):
    """Reads ``compat`` under given answers to its questions."""

    def __init__(self, code: Code, tree: ast.Module) -> None:
        super().__init__(code, COMPAT, tree)
        self._answers: dict[str, bool] = {}
        self._imports = [node for node in tree.body if isinstance(node, ast.Try)]
        self._keys: dict[str, str] = {}
        self._meanings: dict[str, ast.AST] = {}
        for node in tree.body:
            match node:
                case ast.FunctionDef(name=name, returns=ast.Name(id="bool")):
                    self._keys[name] = name
                    self._meanings[name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if any(
                    self.questions(value)
                ):
                    self._keys[name] = name
                    self._meanings[name] = value
                case ast.Try():
                    # One answer for all names that one ``try`` imports.
                    names = _imported(node)
                    self._keys |= dict.fromkeys(names, names[0])
                    self._meanings[names[0]] = node

    def shapes_by_name(self) -> Iterator[tuple[str, list[Shape]]]:
        """The shapes of each function, of each class and of each import."""
        for node in self.tree.body:
            match node:
                case ast.FunctionDef(name=name) if self.asks(name):
                    continue
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    yield f"compat.{name}", self.shapes(node)
                case ast.ClassDef(name=name):
                    yield f"compat.{name}", self.shapes(node)
                case ast.Try():
                    yield f"compat.{_imported(node)[0]}", self.shapes(node)
                case ast.ImportFrom():
                    yield "compat", self.shapes(node)

    def shapes(self, node: ast.AST) -> list[Shape]:
        questions = self.questions(node)
        found = set()
        for answers in product((True, False), repeat=len(questions)):
            self._answers = dict(zip(questions, answers, strict=True))
            for imports in self._imports:
                list(self.visit(imports, ChainMap()))
            shape = set(self.visit(node, ChainMap()))
            for question, answer in self._answers.items():
                for use in self.condition(questions[question]):
                    shape.add(use if answer else f"no {use}")
            found.add(frozenset(shape))
        # A shape with all uses of another one is never needed.
        return [one for one in found if not any(other < one for other in found)]

    def questions(self, node: ast.AST) -> dict[str, ast.AST]:
        """The questions that a piece of code asks: its text, and one place of each."""
        return {
            key: part
            for part in ast.walk(node)
            if isinstance(part, ast.expr | ast.Try) and (key := self.question(part))
        }

    def condition(self, node: ast.AST) -> list[str]:
        """The use that SGLang has if a question is answered with yes.

        Nothing where the question does not ask for a name of SGLang.
        """
        match node:
            case ast.Call(func=ast.Name(id="hasattr"), args=[of, ast.Constant(name)]):
                return [f"{use}.{name!s}" for use in self.named(of)]
            case ast.Call(func=ast.Name(id=name), args=args):
                function = self._meanings.get(name)
                assert isinstance(function, ast.FunctionDef)
                for part in function.body:
                    list(self.visit(part, ChainMap()))
                match function.body[-1], args:
                    case ast.Return(ast.Compare(ops=[ast.In()])), [of, ast.Constant(n)]:
                        # It asks whether a function takes a parameter.
                        return [f"{use}(*, {n!s}=)" for use in self.named(of)]
                    case ast.Return(ast.expr() as value), _:
                        return self.condition(value)
            case ast.Compare(left=left, ops=[ast.IsNot()]):
                return self.condition(left)
            case ast.Name(id=name) if self._keys.get(name) in self._meanings:
                return self.condition(self._meanings[self._keys[name]])
            case ast.Try(body=[ast.ImportFrom(module=module, names=[alias, *_]), *_]):
                return [f"{module}:{alias.name}"]
        return []

    def named(self, node: ast.expr) -> list[str]:
        """The use that an expression is: a name that was imported, or an attribute."""
        match node:
            case ast.Name(id=name) if name in self.imported:
                return [self.imported[name]]
            case ast.Name():
                kinds = self.kinds(node, ChainMap())
                return [kind for kind in kinds if not kind.startswith("[")]
            case ast.Attribute():
                return list(self.attribute(node, ChainMap()))
        return []

    def asks(self, name: str) -> bool:
        """True for a function of ``compat`` whose result is a question's answer."""
        return isinstance(self._meanings.get(name), ast.FunctionDef)

    def question(self, node: ast.AST) -> str | None:
        match node:
            case ast.Call(func=ast.Name(id=name)) if name == "hasattr":
                return ast.unparse(node)
            case ast.Call(func=ast.Name(id=name)) if self.asks(name):
                return ast.unparse(node)
            case ast.Name(id=name):
                return self._keys.get(name)
            case ast.Try() if node in self._imports:
                return self._keys.get(_imported(node)[0])
            case ast.Try():
                return ast.unparse(node)
        return None

    def answer(self, test: ast.AST) -> bool | None:
        """The value of a condition; None where it asks something else."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _opposite(self.answer(operand))
            case ast.Compare(left=left, ops=[ast.IsNot()]):
                return self.answer(left)
            case ast.Compare(left=left, ops=[ast.Is()]):
                return _opposite(self.answer(left))
            case ast.BoolOp(op=ast.And(), values=values):
                answers = [self.answer(value) for value in values]
                return False if False in answers else None if None in answers else True
        question = self.question(test)
        return None if question is None else self._answers.get(question)

    def visit(self, node: ast.AST, env: ChainMap[str, Kinds]) -> Iterator[str]:
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    self.imported[alias.asname or alias.name] = f"{module}:{alias.name}"
                yield from super().visit(node, env)
            case ast.FunctionDef(body=body) | ast.AsyncFunctionDef(body=body):
                env = env.new_child(self.parameters(node))
                yield from self.block(body, env)
            case ast.If(test=test, body=body, orelse=orelse):
                yield from self.visit(test, env)
                for way in self.ways(test, body, orelse):
                    yield from self.block(way, env)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                yield from self.visit(test, env)
                for way in self.ways(test, [body], [orelse]):
                    yield from self.block(way, env)
            case ast.BoolOp(op=op, values=values):
                for value in values:
                    yield from self.visit(value, env)
                    if self.answer(value) is isinstance(op, ast.Or):
                        return
            case ast.Try(body=body, handlers=handlers):
                # A module-level ``try`` that nothing asks about imports its first way.
                is_there = self._answers.get(self.question(node) or "", True)
                caught = [line for handler in handlers for line in handler.body]
                yield from self.block(body if is_there else caught, env)
            case _:
                yield from super().visit(node, env)

    def ways(
        self, test: ast.expr, yes: Sequence[ast.AST], no: Sequence[ast.AST]
    ) -> list[Sequence[ast.AST]]:
        match self.answer(test):
            case True:
                return [yes]
            case False:
                return [no]
        return [yes, no]

    def block(
        self, nodes: Sequence[ast.AST], env: ChainMap[str, Kinds]
    ) -> Iterator[str]:
        for node in nodes:
            yield from self.visit(node, env)
            if self.ends(node):
                return

    def ends(self, node: ast.AST) -> bool:
        """True if nothing behind a statement runs, under the answers."""
        match node:
            case ast.Return() | ast.Raise():
                return True
            case ast.If(test=test, body=body, orelse=orelse):
                ways = self.ways(test, body, orelse)
                return all(any(map(self.ends, way)) for way in ways)
        return False


def _imported(node: ast.Try) -> list[str]:
    """The names that a ``try`` imports."""
    return sorted(
        alias.asname or alias.name
        for part in node.body
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    )


def _opposite(answer: bool | None) -> bool | None:
    return None if answer is None else not answer
