"""Captured steps over fixed tensors equal eager ones, number by number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmark.speed.launch_gap import Operations
from helpers.recorded_steps import RecordedDecoder
from helpers.static_steps import Decoder, decode, static_group
from helpers.third_party.left_to_right import LeftToRight
from helpers.toy_model import Request, ToyModel, facts_of
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.static_group import StepShape

CASES = [
    (name, cache)
    for name, algorithm in sorted(algorithms().items())
    for cache in algorithm.caches
]
LONGEST = 24


def requests_of(family: str, name: str, cache: str, **options: Any) -> list[Request]:
    """Answers of several lengths; some end at an EOS, one at ``max_forwards``. A part
    of two of them is given."""
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
            template=(
                tuple(None if i % 7 < 4 else 4 for i in range(length))
                if index in (2, 5)
                else None
            ),
        )
        for index, (num_prompt, length) in enumerate(sizes)
    ]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("name", "cache"), CASES)
def test_captured_steps_equal_eager_ones(family: str, name: str, cache: str) -> None:
    requests = requests_of(family, name, cache)
    static = static_group(family, replace(requests[0], length=40), 4, 60)
    for longest, crowd in ((LONGEST, requests), (64, requests[2:3])):
        eager = decode(Decoder(family), crowd)
        decoder = Decoder(family, static, longest)
        assert decode(decoder, crowd) == eager
        assert decoder.num_captured > 0
        assert (decoder.num_eager > 0) == (longest == LONGEST)
    assert {c.done for c in decoder.canvases} == {True}


def test_a_request_with_fewer_ids_than_the_default_keeps_its_own() -> None:
    """The tensors of the fixed group are as wide as the default's. Behind the
    numbers of a narrower request must be zeros, and not the default's numbers."""
    request = Request(
        ToyModel(3), (1, 2), 40, "AdaBlock", {"block_size": 8, "delimiter_ids": [7]}
    )
    wide = {"block_size": 8, "delimiter_ids": list(range(3, 12))}
    static = static_group("llada", replace(request, options=wide), 4, 60)
    eager = decode(Decoder("llada"), [request])
    decoder = Decoder("llada", static, 64)
    assert decode(decoder, [request]) == eager
    assert decoder.num_captured > 0
    assert decode(Decoder("llada"), [replace(request, options=wide)]) != eager


def shapes(*lengths: int) -> list[StepShape]:
    return [
        StepShape(num, length, num * length) for length in lengths for num in (1, 4)
    ]


@pytest.mark.parametrize(
    ("family", "name", "cache"),
    [
        (family, *case)
        for index, case in enumerate(CASES)
        for family in ("llada", "dream")
        # A recording is slow; one family has to do for all but the default algorithm.
        if case[0] == "FullAttnMultiBlock" or (family == "dream") == index % 2
    ],
)
def test_a_recorded_step_runs_without_python(
    family: str, name: str, cache: str
) -> None:
    """Between two replays nothing computes: the host reads a table, and that is all."""
    requests, between = requests_of(family, name, cache), []
    for lengths, crowd in (((12, LONGEST), requests), ((60,), requests[4:5])):
        eager = decode(RecordedDecoder(family).start(6, []), crowd)
        static = static_group(family, replace(requests[0], length=40), 4, 60)
        decoder = RecordedDecoder(family, static)
        decoder.start(6, shapes(*lengths))
        with decoder.model.operations:
            assert decode(decoder, crowd) == eager
        between += decoder.model.between
        assert decoder.model.num_captured > 0
    assert between and not any(between)


WARM = SamplingOptions(temperature=0.7)


@pytest.mark.parametrize(
    ("name", "options", "sampling"),
    [
        ("FullAttnMultiBlock", {}, WARM),
        ("LLaDA", {"cfg_scale": 1.0}, None),
        ("LLaDA", {"logits_eos_inf": True}, None),
        ("LLaDA", {"confidence_eos_eot_inf": True}, None),
        ("LLaDA", {"remasking": "random"}, None),
        ("Dream", {"alg_temp": 0.5}, None),
    ],
)
def test_steps_that_python_has_to_see_say_so(
    name: str, options: dict[str, Any], sampling: SamplingOptions | None
) -> None:
    """One such canvas keeps its whole group out of the captured steps."""
    plain = Request(ToyModel(1), (1,), 12, name, {})
    static = static_group("llada", plain, 4, 60)
    decoder = Decoder("llada", static, 64)
    decoder.join(plain)
    group = decoder.denoiser.only_group()
    assert group is not None and static.accepts(group)
    seen = replace(plain, options=options, sampling=sampling or SamplingOptions())
    decoder.join(seen)
    group = decoder.denoiser.only_group()
    assert group is not None and group.steering is None and not static.accepts(group)
    decoder.sync()
    decode(decoder, [])
    assert decoder.num_eager > 0
    if sampling is None:
        with pytest.raises(ValueError, match=f"no step of {name} can be captured"):
            static_group("llada", seen, 4, 60)


def test_an_algorithm_from_outside_is_asked_and_nothing_breaks() -> None:
    class Broken(LeftToRight):
        def captured_options(self, options: Any) -> Any:
            raise RuntimeError("told to fail")

    for algorithm in (LeftToRight(), Broken()):
        cache, options = CACHES["none"], algorithm.options()
        decoding = Decoding(algorithm, options, cache, cache.options())
        canvas = decoding.new_canvas((1,), 9, facts_of("llada"))
        assert Denoiser(facts_of("llada")).prepare(canvas, decoding).steering is None


def test_groups_that_share_no_capture() -> None:
    """Other options are fine as long as they are in tensors that have room."""
    static = static_group(
        "llada", Request(ToyModel(1), (1,), 32, "FullAttnMultiBlock", {}), 2, 60
    )

    def accepts(*requests: tuple[str, int, dict[str, Any]]) -> bool:
        decoder = Decoder("llada")
        for name, length, options in requests:
            decoder.join(Request(ToyModel(1), (1, 2), length, name, options))
        group = decoder.denoiser.only_group()
        return group is not None and static.accepts(group)

    ours = "FullAttnMultiBlock"
    other = {"early_stop": False, "threshold": 0.1, "max_forwards": 3}
    assert accepts((ours, 32, {}), (ours, 8, other))
    assert not accepts((ours, 33, {}))  # a longer answer
    assert accepts((ours, 8, {"block_size": 8}))
    assert not accepts((ours, 32, {"block_size": 8}))  # more blocks
    assert not accepts(*[(ours, 8, {})] * 3)  # more canvases
    assert not accepts((ours, 32, {"cache": "dual"}))
    assert not accepts(("EntropyThreshold", 32, {}))
    assert not accepts((ours, 8, {}), ("LLaDA", 8, {}))  # two groups


def test_a_group_moves_in_once() -> None:
    """After an eager step its changes are copied; after a captured one nothing is."""
    request = Request(ToyModel(2, eos_bias=-50.0), (1, 2), 40, "LLaDA", {})
    static = static_group("llada", request, 2, 60)
    decoder = Decoder("llada", static, 64)
    for _ in range(2):
        decoder.join(request)
    decoder.sync()
    decoder.step()
    group = decoder.denoiser.only_group()
    assert group is not None
    for _ in range(2):
        with Operations() as operations:
            static.load(group)
        assert operations.names == []
        decoder.step()
    decoder.static = None
    decoder.step()
    with Operations() as operations:
        static.load(group)
    assert 0 < len(operations.names) < len(group.tensors())
    assert set(operations.names) <= {"aten::copy_", "aten::clone"}
