"""Captured steps over fixed tensors equal eager ones, number by number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.static_steps import Decoder, decode, static_group
from helpers.toy_model import Request, ToyModel, facts_of
from sglang_dllm.decoding.registry import algorithms

CASES = [
    (name, cache)
    for name, algorithm in sorted(algorithms().items())
    for cache in algorithm.caches
]
LONGEST = 24


def requests_of(family: str, name: str, cache: str, **options: Any) -> list[Request]:
    """Answers of several lengths; some end at an EOS, one at ``max_forwards``."""
    own, algorithm = {"cache": cache} | options, algorithms()[name]
    unused = algorithm.unused_keys(facts_of(family).family, cache)
    if "block_size" in set(algorithm.options.model_fields) - unused:
        own["block_size"] = 8
    sizes = [(2, 17), (5, 9), (1, 30), (3, 12), (9, 40), (2, 21)]
    return [
        Request(
            ToyModel(index, eos_bias=2.0 * (index % 3 - 1), coarse=index % 2 == 1),
            tuple(range(10, 10 - num_prompt, -1)),
            length,
            name,
            own | ({"max_forwards": 4} if index == 3 else {}),
            ignore_eos=index == 4,
        )
        for index, (num_prompt, length) in enumerate(sizes)
    ]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("name", "cache"), CASES)
def test_captured_steps_equal_eager_ones(family: str, name: str, cache: str) -> None:
    requests = requests_of(family, name, cache)
    static = static_group(family, replace(requests[0], length=40), 4, 60)
    for longest, crowd in ((LONGEST, requests), (64, requests), (64, requests[2:3])):
        eager = decode(Decoder(family), crowd)
        decoder = Decoder(family, static, longest)
        assert decode(decoder, crowd) == eager
        assert decoder.num_captured > 0
        assert (decoder.num_eager > 0) == (longest == LONGEST)
    assert {c.done for c in decoder.canvases} == {True}
