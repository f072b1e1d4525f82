"""Length rules against their plain references, with any algorithm, alone and mixed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import toy_lengths
from helpers.sync_detector import SyncDetector
from helpers.toy_lengths import Decoded, EndingModel, decode, expected
from helpers.toy_model import EOS, MASK, Request, visible
from reference.length_loops import daedal, rho_eos
from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward


@pytest.mark.parametrize("rule", ["rho_eos", "daedal"])
def test_equals_the_published_loop(rule: str) -> None:
    """FastDLLM's rule with the published defaults, on a model without a shift."""
    changes: Counter[str] = Counter()
    requests = [
        Request(
            EndingModel(seed, 3 + (0, 30, 60, 100)[seed % 4]),
            (1, 2, 4)[: 1 + seed % 3],
            (70, 200, 120)[seed % 3],
            "FastDLLM",
            {"length": rule, "block_size": 32, "threshold": 0.9},
            ignore_eos=True,
        )
        for seed in range(24)
    ]
    loop_of = {"rho_eos": rho_eos, "daedal": daedal}[rule]
    for request, one in zip(requests, decode("llada", requests), strict=True):
        loop = loop_of(
            request.model, list(request.prompt), request.length,
            mask_id=MASK, eos_id=EOS,
        )  # fmt: skip
        assert (one.answer, one.lengths) == (loop.ids, loop.lengths)
        lengths = [*loop.lengths, len(loop.ids)]
        changes["longer"] += lengths[-1] > 64
        changes["shorter"] += lengths[-1] < 64
    assert changes["longer"] > 3 and (rule == "daedal" or changes["shorter"] > 3)


ALGORITHMS = (
    *("LLaDA", "FastDLLM", "EntropyThreshold", "FullAttnMultiBlock"),
    *("LocalLeap", "Hierarchical", "Credit", "AdaBlock"),
)
BY_ENTROPY = ("EntropyThreshold", "FullAttnMultiBlock")
share = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])
positions = st.sampled_from([1, 3, 8, 20, 33])


def options(**keys: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


RULES = {
    "append": options(append_blocks=st.sampled_from([1, 2, 5])),
    "rho_eos": options(
        initial_length=positions,
        length_step=st.sampled_from([1, 3, 8]),
        eos_check_tokens=st.sampled_from([1, 4, 16, 32]),
        low_density=share,
        high_density=share,
        step_schedule=st.sampled_from(["exp", "linear", "const"]),
    ),
    "daedal": options(
        initial_length=positions,
        length_step=st.sampled_from([1, 3, 8]),
        eos_check_tokens=st.sampled_from([1, 4, 16, 32]),
        start_eos_confidence=share,
        insert_eos_confidence=share,
        insert_confidence=share,
    ),
}
OWN = {
    "LLaDA": {"remasking": ["low_confidence", "random"], "cfg_scale": [0.0, 1.0]},
    "FastDLLM": {"threshold": [0.2, 0.7, 0.9]},
    "EntropyThreshold": {"threshold": [0.0, 0.4, 2.0]},
    "FullAttnMultiBlock": {"threshold": [0.0, 0.4, 2.0], "early_stop": [True, False]},
    "LocalLeap": {"anchor_threshold": [0.5, 0.9]},
    "Hierarchical": {"threshold": [0.5, 0.9]},
    "Credit": {"threshold": [0.5, 0.9]},
    "AdaBlock": {"delimiter_threshold": [0.1, 0.5]},
}


@st.composite
def requests(
    draw: st.DrawFn, family: str, rule: str | None = None, algorithm: str | None = None
) -> Request:
    rule = rule or draw(st.sampled_from(sorted(RULES)))
    algorithm = algorithm or draw(st.sampled_from(ALGORITHMS))
    caches = ["none", "prefix", "dual", "vicinity", "delayed"]
    # Dream's FastDLLM has blocks with a cache only, AdaBlock none that wait.
    without = {"AdaBlock": {"delayed"}, "FastDLLM": {"none"}}.get(algorithm, set())
    if without != {"none"} or family == "dream":
        caches = [cache for cache in caches if cache not in without]
    cache = draw(st.sampled_from(caches))
    own = {key: draw(st.sampled_from(values)) for key, values in OWN[algorithm].items()}
    if cache != "none":
        own.pop("cfg_scale", None)
    if algorithm == "LLaDA" and rule == "append" and draw(st.booleans()):
        own["steps"] = 40
    own["block_size"] = draw(st.sampled_from([1, 4, 7, 32]))
    limit = draw(st.sampled_from([None, None, None, 1, 2, 9]))
    own |= {} if limit is None else {"max_forwards": limit}
    sampling = SamplingOptions(seed=draw(st.integers(0, 9)))
    # The references of the entropy rules know temperature 0 only.
    if algorithm not in BY_ENTROPY and draw(st.booleans()):
        sampling = SamplingOptions(temperature=1.0, seed=sampling.seed)
    return Request(
        EndingModel(
            draw(st.integers(0, 2**20)),
            draw(st.sampled_from([0, 9, 20, 60])),
            draw(st.sampled_from([2, 9])),
        ),
        tuple(draw(st.lists(st.integers(0, 10), min_size=1, max_size=6))),
        draw(st.integers(1, 60)),
        algorithm,
        {"length": rule, **draw(RULES[rule]), "cache": cache, **own},
        sampling,
        ignore_eos=draw(st.booleans()),
    )


def check(family: str, request: Request, one: Decoded) -> None:
    wanted, canvas = expected(family, request), one.canvas
    assert visible(one.answer) == visible(wanted.ids)
    if request.algorithm != "FullAttnMultiBlock" or request.ignore_eos:
        assert one.answer == wanted.ids
    assert one.lengths == wanted.lengths
    assert canvas.num_forwards == wanted.nfe
    assert canvas.tokens_computed == wanted.tokens_computed
    assert canvas.tokens_cached == wanted.tokens_cached
    assert canvas.full_refreshes == wanted.full_refreshes
    assert tuple(canvas.ids[: canvas.answer_start]) == request.prompt


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rule", sorted(RULES))
@given(family=st.sampled_from(["llada", "dream"]), data=st.data())
def test_equals_its_reference(
    family: str, algorithm: str, rule: str, data: st.DataObject
) -> None:
    request = data.draw(requests(family, rule, algorithm))
    (one,) = decode(family, [request])
    check(family, request, one)


@pytest.mark.parametrize("family", ["llada", "dream"])
@given(data=st.data())
def test_a_mixed_batch_gives_each_what_it_gets_alone(
    family: str, data: st.DataObject
) -> None:
    crowd = data.draw(st.lists(requests(family), min_size=2, max_size=7))
    for request, one in zip(crowd, decode(family, crowd), strict=True):
        check(family, request, one)


@pytest.mark.parametrize("rule", ["rho_eos", "daedal"])
def test_a_measured_step_asks_the_device_for_nothing(rule: str) -> None:
    """The numbers of a rule come with the tokens of its step."""

    class Watched(Denoiser):
        def pack(self) -> PackedForward:
            with SyncDetector():
                return super().pack()

        def commit(self, logits: Logits) -> None:
            with SyncDetector():
                super().commit(logits)

    options = {"length": rule, "initial_length": 16, "block_size": 8}
    crowd = [
        Request(EndingModel(seed, 20), (1, 2), 40, "FastDLLM", options)
        for seed in range(3)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_lengths, "Denoiser", Watched)
        watched = decode("llada", crowd)
    assert [one.answer for one in watched] == [
        one.answer for one in decode("llada", crowd)
    ]
