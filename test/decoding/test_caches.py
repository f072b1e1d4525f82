"""The windows that each cache strategy chooses, forward by forward."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from helpers import toy_model
from helpers.scripted_model import ScriptedModel, even, peak, word
from helpers.toy_model import EOS, NEWLINE, Request
from helpers.toy_model import decode as decode_batch
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.packing import PackedForward

Window = tuple[int, int]


def windows_of(family: str, *requests: Request) -> list[list[Window]]:
    """The windows of each request's forwards, all decoded in one batch."""
    seen: dict[int, list[Window]] = defaultdict(list)

    class Watched(Denoiser):
        def pack(self) -> PackedForward:
            for canvas in self.canvases:
                start, end = canvas.window
                assert 0 <= start < end <= len(canvas)
                seen[id(canvas)].append((start, end))
            packed = super().pack()
            positions = [torch.arange(w.start, w.end) for w in packed.windows]
            assert packed.positions.tolist() == torch.cat(positions).tolist()
            return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_model, "Denoiser", Watched)
        canvases = decode_batch(family, requests)
    return [seen[id(canvas)] for canvas in canvases]


def cached(family: str, cache: str, **options: Any) -> Request:
    """Three tokens of prompt, then six in blocks of two, one a forward, in order."""
    model = ScriptedModel(family, word(0.8, 0.7, 0.6, 0.5, 0.4, 0.3))
    options = {"threshold": 1.0, "block_size": 2, "cache": cache, **options}
    return Request(model, (1, 1, 1), 6, "FastDLLM", options)


ALL = (0, 9)
CACHES: tuple[tuple[str, dict[str, int], list[Window]], ...] = (
    ("prefix", {}, [ALL, (3, 9), ALL, (5, 9), ALL, (7, 9)]),
    ("prefix", {"max_forwards": 4}, [ALL, (3, 9), ALL, ALL]),
    ("dual", {}, [ALL, (3, 5), ALL, (5, 7), ALL, (7, 9)]),
    ("dual", {"max_forwards": 4}, [ALL, (3, 5), ALL, ALL]),
    # A warm-up of one full forward, then the one that fills the cache.
    (
        "vicinity",
        {"prefix_look": 1, "after_look": 2, "warmup": 1},
        [ALL, ALL, ALL, (4, 9), ALL, (6, 9)],
    ),
    # The cache is filled at the end of the second block.
    (
        "vicinity",
        {"prefix_look": 1, "after_look": 2, "warmup": 3},
        [ALL, ALL, ALL, ALL, ALL, (6, 9)],
    ),
    # The cache is filled in the second block, and refreshed there one window later.
    (
        "vicinity",
        {"prefix_look": 1, "after_look": 0, "warmup": 3, "block_size": 3},
        [ALL, ALL, ALL, ALL, (5, 9), ALL],
    ),
    # Never again in the first block.
    (
        "vicinity",
        {"prefix_look": 1, "after_look": 0, "warmup": 1, "block_size": 6},
        [ALL, ALL, (2, 9), (2, 9), (2, 9), (2, 9)],
    ),
    (
        "vicinity",
        {"prefix_look": 3, "after_look": 0, "warmup": 0},
        [ALL, (0, 5), ALL, (2, 7), ALL, (4, 9)],
    ),
    # A finished block is recomputed until it has waited, the last time as it joins.
    (
        "delayed",
        {"cache_delay_iter": 0, "refresh_interval": 10_000},
        [ALL, (3, 9), (3, 9), (5, 9), (5, 9), (7, 9)],
    ),
    (
        "delayed",
        {"cache_delay_iter": 0, "refresh_interval": 10_000, "max_forwards": 4},
        [ALL, (3, 9), (3, 9), ALL],
    ),
    # The third forward would be full, but a block joins; the sixth is.
    (
        "delayed",
        {"cache_delay_iter": 0, "refresh_interval": 3},
        [ALL, (3, 9), (3, 9), (5, 9), (5, 9), ALL],
    ),
    (
        "delayed",
        {"cache_delay_iter": 1, "refresh_interval": 10_000},
        [ALL, (3, 9), ALL, (3, 9), ALL, (5, 9)],
    ),
)


def shifted(family: str, windows: list[Window]) -> list[Window]:
    shift = 1 if family == "dream" else 0
    return [w if w == ALL else (max(w[0] - shift, 0), w[1]) for w in windows]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("index", range(len(CACHES)))
def test_windows_of_a_cache(family: str, index: int) -> None:
    cache, options, want = CACHES[index]
    (got,) = windows_of(family, cached(family, cache, **options))
    assert got == shifted(family, want)


def test_windows_of_caches_in_one_batch() -> None:
    crowd = [cached("llada", cache, **options) for cache, options, _ in CACHES]
    got = windows_of("llada", cached("llada", "none"), *crowd)
    assert got == [[ALL] * 6, *[want for _, _, want in CACHES]]


@pytest.mark.parametrize(
    ("family", "want"),
    [
        # 5 to 7 was found finished before the third forward, but 3 to 5 waited then.
        ("llada", [(0, 11), (0, 11), (0, 11), (3, 11), (0, 11), (5, 11)]),
        ("dream", [(0, 11), (0, 11), (0, 11), (2, 11), (4, 11), (0, 11)]),
    ],
)
def test_on_llada_a_block_starts_to_wait_behind_the_one_before(
    family: str, want: list[Window]
) -> None:
    model = ScriptedModel(family, [*[even(1)] * 4, *word(0.8, 0.7, 0.6, 0.5)])
    options = {"cache_delay_iter": 2, "refresh_interval": 10_000}
    options |= {"threshold": 1.0, "block_size": 2, "cache": "delayed"}
    request = Request(model, (1, 1, 1), 8, "FastDLLM", options)
    assert windows_of(family, request) == [want]


def test_blocks_that_become_finished_at_once_join_at_once() -> None:
    options = {"cache": "delayed", "cache_delay_iter": 0, "block_size": 2}
    options |= {"block_add_threshold": 0.0, "refresh_interval": 10_000}
    model = ScriptedModel("llada", [even(1)] * 8)  # blocks 1 and 2, then 3, then 4
    request = Request(model, (1, 1, 1), 8, "FullAttnMultiBlock", options)
    assert windows_of("llada", request) == [[(0, 11), (3, 11), (7, 11)]]


def test_the_span_of_several_blocks() -> None:
    # From the first mask's block to the last one that is active or has masks.
    # Blocks 1 and 2 have one sure position, the others are forced; block 3 is sure.
    options = {"cache": "dual", "block_size": 4, "threshold": 0.1}
    options |= {"block_add_threshold": 0.25}
    hard = [even(4)] * 3
    frame = [even(1), *hard, even(1), *hard, *[even(1)] * 4]
    for progress, end in ((0.95, 11), (0.25, 15)):
        options["decoded_token_threshold"] = progress
        model = ScriptedModel("llada", frame)
        request = Request(model, (1, 1, 1), 12, "FullAttnMultiBlock", options)
        full = (0, 15)
        want = [full, (3, 11), (3, 15), (3, end), full, (7, end), (7, end)]
        assert windows_of("llada", request) == [want]


def test_the_span_behind_an_eos() -> None:
    # Block 2 is not active when an EOS fills it; it is recomputed all the same.
    options = {"cache": "dual", "block_size": 4, "threshold": 0.1}
    options |= {"block_add_threshold": 0.25, "early_stop": True}
    later = [even(4)] * 8
    later[2] = peak((EOS, 0.9999))
    model = ScriptedModel("llada", [even(1), *[even(4)] * 7], later)
    request = Request(model, (1, 1, 1), 8, "FullAttnMultiBlock", options)
    assert windows_of("llada", request) == [[(0, 11), (3, 11), (3, 11)]]


def test_the_span_of_an_adaptive_block() -> None:
    # The first forward looks 3 ahead. Blocks end at 2 and 5, by their newlines, then
    # at 8 and 11.
    frame = word(*[0.5] * 12)
    frame[1], frame[4] = peak((NEWLINE, 0.6)), peak((NEWLINE, 0.8))
    options = {"cache": "dual", "block_size": 3, "delimiter_threshold": 0.5}
    request = Request(ScriptedModel("llada", frame), (1, 1, 1), 12, "AdaBlock", options)
    want = [(3, 5), *[(5, 8)] * 2, *[(8, 11)] * 2, *[(11, 14)] * 2]
    for index in (0, 2, 5, 8, 11):
        want.insert(index, (0, 15))
    assert windows_of("llada", request) == [want]


def test_the_rows_of_windows_are_counted() -> None:
    dual, none = decode_batch("llada", [cached("llada", c) for c in ("dual", "none")])
    assert (dual.tokens_computed, dual.tokens_cached, dual.full_refreshes) == (
        33,
        21,
        3,
    )
    assert (none.tokens_computed, none.tokens_cached, none.full_refreshes) == (54, 0, 0)
