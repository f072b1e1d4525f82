"""The table of mutations fits the code. That they are killed: `test/mutation.py`."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutation import UNIT, mutated
from mutations import MUTATIONS, Mutation

from sglang_dllm.decoding.registry import OURS

NAMES = {kind.__name__ for kind in OURS}
TEST_FUNCTIONS: dict[str, set[str]] = {}


def functions(file: str) -> set[str]:
    if file not in TEST_FUNCTIONS:
        tree = ast.parse(Path(UNIT, file).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        TEST_FUNCTIONS[file] = names
    return TEST_FUNCTIONS[file]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code(mutation: Mutation) -> None:
    ast.parse(mutated(mutation))  # the old text is there exactly once
    assert mutation.old != mutation.new
    assert set(mutation.algorithms) <= NAMES
    assert mutation.notice and mutation.tests
    for test in mutation.tests:
        file, _, case = test.partition("::")
        assert case.partition("[")[0] in functions(file), test


def test_every_algorithm_is_broken_in_two_ways_at_least() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    ways = Counter(name for m in MUTATIONS for name in m.algorithms)
    own = Counter(m.algorithms[0] for m in MUTATIONS if len(m.algorithms) == 1)
    for name in NAMES:
        assert ways[name] >= 2 and own[name] >= 2, name
