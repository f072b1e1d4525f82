"""Breaks ``decoding/`` in random ways, one at a time: do its tests notice?

    python test/helpers/mutation.py [--num 40] [--seed 0] [--tests test/decoding]

A mutant is the package with one change to the syntax tree of one file: another
comparison or operator, another number, a negated condition, a dropped statement. Prints
every mutant that the tests let pass, and the share that they kill. Some survivors
compute the same as the original: a person reads them.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
TARGET = Path("python/sglang_dllm/decoding")
COPIED = ("benchmark", "python", "test", "pyproject.toml")

OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
NAMES = {"any": "all", "min": "max", "amin": "amax", "argmin": "argmax"}
NAMES |= {"minimum": "maximum", "floor": "ceil", "cummin": "cummax"}
NAMES |= {other: name for name, other in NAMES.items()}

Site = tuple[ast.AST, str, Callable[[], None]]
"""A node, what changes there, and the function that changes it in place."""


def replaced(node: ast.AST, field: str, value: object, label: str) -> Site:
    return node, label, lambda: setattr(node, field, value)


def changes(node: ast.AST) -> Iterator[Site]:
    """The mutations of one node, without those of its children."""
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for other in OPERATORS.get(type(node.op), ()):
            label = f"{type(node.op).__name__} becomes {other.__name__}"
            yield replaced(node, "op", other(), label)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in OPERATORS[type(op)]:
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                label = f"{type(op).__name__} becomes {other.__name__}"
                yield replaced(node, "ops", ops, label)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        negated = ast.UnaryOp(ast.Not(), node.test)
        yield replaced(node, "test", negated, "the condition is negated")
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        kind = type(node.value)
        value = not node.value if kind is bool else node.value + 1
        yield replaced(node, "value", value, f"{node.value} becomes {value}")
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        double = ast.UnaryOp(node.op, node.operand)
        label = f"{type(node.op).__name__} is left out"
        yield replaced(node, "operand", double, label)
    elif isinstance(node, ast.Call):
        field = {ast.Attribute: "attr", ast.Name: "id"}.get(type(node.func), "")
        if (name := getattr(node.func, field, None)) in NAMES:
            label = f"{name} becomes {NAMES[name]}"
            yield replaced(node.func, field, NAMES[name], label)
    for body in (getattr(node, name, None) for name in ("body", "orelse")):
        for i, statement in enumerate(body if isinstance(body, list) else ()):
            if may_be_dropped(statement):
                drop = replaced_item(body, i)
                yield statement, "the statement is left out", drop


def replaced_item(body: list[ast.stmt], index: int) -> Callable[[], None]:
    return lambda: body.__setitem__(index, ast.Pass())


def may_be_dropped(node: ast.stmt) -> bool:
    """Not the first assignment of a name, without which nothing runs, and no text."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return not any(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
    return isinstance(node, ast.AugAssign | ast.Continue | ast.Break | ast.Delete)


def sites(node: ast.AST) -> Iterator[Site]:
    """All mutations below a node; annotations and decorators stay as they are."""
    yield from changes(node)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_left_alone(child):
                yield from sites(child)


def is_left_alone(node: ast.AST) -> bool:
    """Errors and texts, and ``strict=True``: to change them changes no result."""
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr)


@dataclass(frozen=True)
class Mutant:
    file: Path
    index: int
    """Among the sites of the file."""
    line: int
    label: str

    @staticmethod
    def of(file: Path) -> list[Mutant]:
        found = enumerate(sites(ast.parse((ROOT / file).read_text())))
        return [Mutant(file, i, n.lineno, label) for i, (n, label, _) in found]  # type: ignore[attr-defined]

    def source(self) -> str:
        tree = ast.parse((ROOT / self.file).read_text())
        list(sites(tree))[self.index][2]()
        return ast.unparse(ast.fix_missing_locations(tree))

    def __str__(self) -> str:
        line = (ROOT / self.file).read_text().splitlines()[self.line - 1].strip()
        return f"{self.file.relative_to(TARGET)}:{self.line}: {self.label}: {line}"


def passes(copy: Path, tests: list[str], seconds: float) -> bool:
    """True if the tests pass on a copy of the tree; not if they take too long."""
    options = "-q -x -p no:cacheprovider --hypothesis-profile quick --timeout 0"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *tests, *options.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy / "python")},
            stdout=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--num", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=["test/decoding"])
    args = parser.parse_args()
    files = sorted((ROOT / TARGET).rglob("*.py"))
    mutants = [m for file in files for m in Mutant.of(file.relative_to(ROOT))]
    num = min(args.num, len(mutants))
    chosen = random.Random(args.seed).sample(mutants, num)
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(os.cpu_count() or 1):
            copy = Path(folder) / str(i)
            copies.put(copy)
            for name in COPIED:
                source = ROOT / name
                (shutil.copytree if source.is_dir() else shutil.copy)(
                    source, copy / name
                )
        start = time.monotonic()
        if not passes(copy, args.tests, 3600):
            sys.exit("the tests fail on the unbroken tree: there is nothing to measure")
        limit = 30 + 5 * (time.monotonic() - start)

        def survives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                (copy / mutant.file).write_text(mutant.source())
                return passes(copy, args.tests, limit)
            finally:
                shutil.copy(ROOT / mutant.file, copy / mutant.file)
                copies.put(copy)

        with ThreadPoolExecutor() as pool:
            survivors = 0
            for mutant, lives in zip(chosen, pool.map(survives, chosen), strict=True):
                survivors += lives
                print("survives" if lives else "killed  ", mutant, flush=True)
    print(f"{num - survivors} of {num} mutants killed ({len(mutants)} are possible)")


if __name__ == "__main__":
    main()
