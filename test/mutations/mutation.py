"""What a mutation is, and the names that the tables share."""

from __future__ import annotations

from dataclasses import dataclass

EVERY = (
    *("LLaDA", "Dream", "FastDLLM", "EntropyThreshold", "FullAttnMultiBlock"),
    *("LocalLeap", "AdaptiveParallel", "Hierarchical", "Credit", "AdaBlock"),
)
BY_CONFIDENCE = (
    *("FastDLLM", "LocalLeap", "AdaptiveParallel", "Hierarchical", "Credit"),
    "AdaBlock",
)
BY_ENTROPY = ("EntropyThreshold", "FullAttnMultiBlock")
CACHE = "decoding/cache.py"
CANVASES = "decoding/canvases.py"
DECODER = "decoding/decoder.py"
LAYOUT = "decoding/layout.py"
KERNEL = "kernels/row_statistics.py"
SHARED = "test_shared_edges.py::test_"
EDGES = "test_algorithm_edges.py::test_"
DECODING = "test_decoding.py::test_"
CONFIG = "test_config.py::test_"
SELECTION = "test_selection.py::test_"
REFERENCE = "test_algorithms.py::test_equals_its_reference"


@dataclass(frozen=True)
class Mutation:
    """One way to break the decoding.

    Attributes:
        algorithms: those that it breaks.
        file: below python/sglang_dllm.
        old: text that the file has exactly once.
        notice: what a user would see.
        tests: node ids below test/unit; of each, at least one case must fail.
    """

    name: str
    algorithms: tuple[str, ...]
    file: str
    old: str
    new: str
    notice: str
    tests: tuple[str, ...]


def each(test: str, algorithms: tuple[str, ...]) -> tuple[str, ...]:
    """The case of a test for each of some algorithms."""
    return tuple(f"{SHARED}{test}[{name}]" for name in algorithms)


def without(*left_out: str) -> tuple[str, ...]:
    return tuple(name for name in EVERY if name not in left_out)


RANKED = without("Credit", *BY_ENTROPY)
"""Those that rank positions; the others look for a best one."""


def one(
    algorithm: str, name: str, file: str, old: str, new: str, notice: str, *tests: str
) -> Mutation:
    """A mutation that breaks a single algorithm."""
    return Mutation(f"{algorithm}: {name}", (algorithm,), file, old, new, notice, tests)
