"""Every algorithm against its plain reference, on random logits, alone and mixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.toy_model import (
    EOS,
    FAMILY,
    MASK,
    NEWLINE,
    TURN_END,
    VOCAB,
    Request,
    ToyModel,
    answer,
    decode,
    reference_edits,
    reference_sampling,
)
from reference.algorithms import run
from reference.decoding import Result, first_eos
from reference.memory import TokenModel
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions

share = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0])
blocks = st.sampled_from([1, 4, 5, 8, 32])
nats = st.sampled_from([0.0, 0.1, 0.4, 0.5, 1.0, 2.0, 999.0])


def options(**keys: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


FAST_DLLM_RULE = st.one_of(
    options(threshold=share),
    st.fixed_dictionaries({"factor": st.sampled_from([0.0, 0.5, 1.0, 3.0])}),
)
OPTIONS: dict[str, st.SearchStrategy] = {
    "EntropyThreshold": options(block_size=blocks, threshold=nats),
    "FullAttnMultiBlock": options(
        block_size=blocks,
        threshold=nats,
        block_add_threshold=share,
        decoded_token_threshold=st.sampled_from([0.5, 0.95, 1.0]),
        early_stop=st.booleans(),
    ),
    "LLaDA": options(
        block_size=blocks,
        steps=st.sampled_from([40, 41, 60, 200]),
        remasking=st.sampled_from(["low_confidence", "random"]),
        cfg_scale=st.sampled_from([0.0, 0.5, 2.0]),
        logits_eos_inf=st.booleans(),
        confidence_eos_eot_inf=st.booleans(),
    ),
    "Dream": options(
        steps=st.sampled_from([1, 3, 8, 20, 64]),
        alg=st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]),
        alg_temp=st.sampled_from([0.0, 0.3, 2.0]),
        eps=st.sampled_from([0.0, 0.001, 0.3]),
    ),
    "LocalLeap": options(
        block_size=blocks,
        anchor_threshold=share,
        neighbor_threshold=share,
        radius=st.integers(0, 6),
    ),
    "AdaptiveParallel": options(max_parallel=st.integers(1, 9), threshold=share),
    "Hierarchical": options(block_size=blocks, threshold=share, low_threshold=share),
    "Credit": options(
        block_size=blocks,
        threshold=share,
        credit_alpha=st.sampled_from([0.0, 0.7, 5.0]),
        boost_gamma=st.sampled_from([0.0, 0.2, 1.0]),
        decay_beta=st.sampled_from([0.0, 0.8, 1.0]),
    ),
    "AdaBlock": options(
        block_size=blocks,
        threshold=share,
        delimiter_threshold=share,
        delimiter_ids=st.sampled_from([[], [NEWLINE], [0, 1, 2, NEWLINE]]),
    ),
}


def options_of(algorithm: str, family: str) -> st.SearchStrategy[dict[str, Any]]:
    if algorithm == "FastDLLM":
        own = (
            options(block_size=blocks)
            if family == "llada"
            else options(steps=st.integers(1, 30))
        )
        return st.builds(lambda a, b: a | b, FAST_DLLM_RULE, own)
    return OPTIONS[algorithm]


ALGORITHMS = [*OPTIONS, "FastDLLM"]
BY_ENTROPY = ("EntropyThreshold", "FullAttnMultiBlock")
CACHED = [name for name in ALGORITHMS if name not in ("Dream", "AdaptiveParallel")]
look = st.integers(0, 6)
CACHES = [
    st.just({"cache": "prefix"}),
    st.just({"cache": "dual"}),
    st.builds(
        lambda looks: {"cache": "vicinity", **looks},
        options(prefix_look=look, after_look=look, warmup=st.integers(0, 5)),
    ),
    st.builds(
        lambda intervals: {"cache": "delayed", **intervals},
        options(
            cache_delay_iter=st.integers(0, 3),
            refresh_interval=st.sampled_from([1, 2, 3, 5, 10_000]),
        ),
    ),
]


@st.composite
def cached_options(draw: st.DrawFn, algorithm: str, family: str) -> dict[str, Any]:
    """An algorithm's options with a cache."""
    kinds = CACHES[:3] if algorithm == "AdaBlock" else CACHES
    chosen = draw(options_of(algorithm, family)) | draw(st.one_of(kinds))
    chosen.pop("cfg_scale", None)
    if algorithm == "FastDLLM" and family == "dream":
        # Block-wise with a cache, and only then.
        chosen.pop("steps", None)
        chosen["block_size"] = draw(blocks)
    return chosen


SAMPLING = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.8, 0.2]),
    top_k=st.sampled_from([0, 1, 4]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**40),
)


@st.composite
def requests(
    draw: st.DrawFn,
    family: str,
    algorithm: str | None = None,
    cached: bool | None = None,
    gaps: bool | None = None,
) -> Request:
    """
    Args:
        gaps: whether a part of the answer is given.
    """
    algorithm = algorithm or draw(st.sampled_from(ALGORITHMS))
    limit = draw(st.sampled_from([None, None, None, 1, 2, 5]))
    if cached is None:
        cached = algorithm in CACHED and draw(st.booleans())
    kind = cached_options if cached else options_of
    chosen = draw(kind(algorithm, family))
    length = draw(st.integers(1, 40))
    with_gaps = draw(st.booleans()) if gaps is None else gaps
    if algorithm == "LLaDA" and draw(st.booleans()):
        # Fewer steps than tokens, so that a step commits several.
        least = -(-length // chosen.get("block_size", 32))
        chosen["steps"] = draw(st.integers(least, least + 8))
    return Request(
        model=ToyModel(
            draw(st.integers(0, 2**20)),
            draw(st.sampled_from([-50.0, 0.0, 3.0])),
            draw(st.booleans()),
        ),
        prompt=tuple(draw(st.lists(st.integers(0, 10), min_size=0, max_size=6))),
        length=length,
        algorithm=algorithm,
        options=chosen if limit is None else {**chosen, "max_forwards": limit},
        # The references of the entropy rules know temperature 0 only.
        sampling=(SamplingOptions() if algorithm in BY_ENTROPY else draw(SAMPLING)),
        template=draw(templates(length)) if with_gaps else None,
    )


@st.composite
def templates(draw: st.DrawFn, length: int) -> tuple[int | None, ...]:
    """Runs of masks and of text, EOS and mask tokens among it; one mask at least."""
    found: list[int | None] = []
    while len(found) < length:
        run = draw(st.integers(1, 12))
        tokens = st.one_of(st.none(), st.integers(0, VOCAB - 1))
        found += [draw(tokens)] * run if draw(st.booleans()) else [None] * run
    found = found[:length]
    if None not in found:
        found[draw(st.integers(0, length - 1))] = None
    return tuple(found)


def expected(family: str, request: Request) -> Result:
    return run(
        request.algorithm,
        TokenModel(request.model, bool(FAMILY[family].shift)),
        list(request.prompt),
        request.length,
        request.options,
        reference_sampling(request.sampling),
        family=family,
        mask_id=MASK,
        eos_id=EOS,
        template=request.template,
        edits=reference_edits(request.edits),
        eot_token_id=TURN_END,
        delimiter_ids=(
            (NEWLINE,)
            if request.options.get("delimiter_ids") is None
            else request.options["delimiter_ids"]
        ),
    )


def check(family: str, request: Request, canvas: Canvas) -> None:
    wanted = expected(family, request)
    stops = request.options.get("early_stop", family == "llada")
    if request.algorithm == "FullAttnMultiBlock" and stops:
        # Behind an EOS the published loop may leave junk; nobody sees it.
        end = first_eos(wanted.ids, EOS, wanted.ends_from)
        assert answer(canvas)[:end] == wanted.ids[:end]
        assert first_eos(answer(canvas), EOS, wanted.ends_from) == end
    else:
        assert answer(canvas) == wanted.ids
    assert canvas.num_forwards == wanted.nfe
    assert canvas.tokens_computed == wanted.tokens_computed
    assert canvas.tokens_cached == wanted.tokens_cached
    assert canvas.full_refreshes == wanted.full_refreshes
    assert tuple(canvas.ids[: canvas.prompt_len]) == request.prompt


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_equals_its_reference(family: str, algorithm: str, data: st.DataObject) -> None:
    request = data.draw(requests(family, algorithm, cached=False, gaps=False))
    (canvas,) = decode(family, [request])
    check(family, request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", CACHED)
@given(data=st.data())
def test_equals_its_reference_with_a_cache(
    family: str, algorithm: str, data: st.DataObject
) -> None:
    request = data.draw(requests(family, algorithm, cached=True, gaps=False))
    (canvas,) = decode(family, [request])
    check(family, request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_equals_its_reference_where_a_part_of_the_answer_is_given(
    family: str, algorithm: str, data: st.DataObject
) -> None:
    request = data.draw(requests(family, algorithm, gaps=True))
    (canvas,) = decode(family, [request])
    check(family, request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("num", [1, 3])
def test_more_candidates_than_were_looked_for(family: str, num: int) -> None:
    """A second block of 32 comes to the masks of the first one."""
    options = {"threshold": 0.7, "block_size": 32, "early_stop": False}
    for seed in range(5):
        model = ToyModel(seed, eos_bias=-50.0)
        request = Request(model, (1,), 70, "FullAttnMultiBlock", options)
        crowd = [request, replace(request, length=40), replace(request, length=20)]
        for one, canvas in zip(crowd[:num], decode(family, crowd[:num]), strict=True):
            check(family, one, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
@given(data=st.data())
def test_a_mixed_batch_gives_each_what_it_gets_alone(
    family: str, data: st.DataObject
) -> None:
    crowd = data.draw(st.lists(requests(family), min_size=2, max_size=9))
    for request, canvas in zip(crowd, decode(family, crowd), strict=True):
        check(family, request, canvas)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_llada_shares_its_steps_among_the_blocks_that_have_masks(family: str) -> None:
    given: list[int | None] = [1] * 40
    given[3:6] = [None] * 3
    given[24:32] = [None] * 8
    options = {"block_size": 8, "steps": 6}
    model = ToyModel(1, eos_bias=-50.0)
    request = Request(model, (1,), 40, "LLaDA", options, template=tuple(given))
    (canvas,) = decode(family, [request])
    check(family, request, canvas)
    assert canvas.num_forwards == 6
