"""Cached canvases of the references: memories against full forwards, hand schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_a2d_checkpoints import write_a2d_qwen3, write_illada
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import write_diffullama, write_llada_moe
from reference.algorithms import DEFAULTS, run
from reference.cache import Delayed
from reference.decoding import Result
from reference.memory import TokenMemory, TokenModel, usable_rows
from reference.models import load
from reference.record import Window
from reference.script import EOS, MASK, NEWLINE, Script, decode, random_rows, says

FULL = None
FAMILIES = ("llada", "dream")
CACHED = [
    (family, name) for family in FAMILIES for name in DEFAULTS[family]
    if "cache" in DEFAULTS[family][name]
]  # fmt: skip
# Writer of a checkpoint, and what it calls the number of layers.
CHECKPOINTS: dict[str, tuple[Callable[..., Path], str]] = {
    "llada": (write_llada, "n_layers"),
    "dream": (write_dream, "num_hidden_layers"),
    "llada_moe": (write_llada_moe, "num_hidden_layers"),
    "diffullama": (write_diffullama, "num_hidden_layers"),
    "illada": (write_illada, "num_hidden_layers"),
    "a2d_qwen3": (write_a2d_qwen3, "num_hidden_layers"),
}
WINDOWS = [(0, 24), (0, 1), (0, 9), (7, 15), (23, 24), (11, 24)]


def written(name: str, path: Path, num_layers: int) -> Any:
    write, layers = CHECKPOINTS[name]
    return load(write(path, seed=1, **{layers: num_layers}))


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same rows computed, and the same logits in them."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_windows_of_an_unchanged_canvas(tmp_path: Path, name: str) -> None:
    """The rows of the full forward; the whole canvas is a window like any other."""
    model = written(name, tmp_path, num_layers=2)
    ids = torch.arange(40, 64)
    memory, raw = model.new_memory(), model.raw_logits(ids)
    assert_same(memory.full(ids), model.logits(ids))
    for lo, hi in WINDOWS:
        got = memory.window(ids, lo, hi)
        assert_same(got, usable_rows(raw[lo:hi], lo, 24, model.family == "dream"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_layer_remembers_tokens(tmp_path: Path, name: str) -> None:
    """A first layer's keys and values know the token of their position, no other.

    So a window of one layer has the logits of a full forward over the tokens that each
    position was last computed with, which needs no memory of keys and values.
    """
    model = written(name, tmp_path, num_layers=1)
    memory = model.new_memory()
    tokens = TokenMemory(model.raw_logits, model.family == "dream")
    rng = torch.Generator().manual_seed(0)
    for windows in (WINDOWS[1:], WINDOWS[::-1]):
        ids = torch.randint(32, 127, (24,), generator=rng)
        assert_same(memory.full(ids), tokens.full(ids))
        for window in windows:
            ids = torch.randint(32, 127, (24,), generator=rng)
            assert_same(memory.window(ids, *window), tokens.window(ids, *window))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_window_sees_its_own_changes_only(tmp_path: Path, name: str) -> None:
    model = written(name, tmp_path, num_layers=2)
    old, new = torch.arange(40, 64), torch.arange(70, 94)
    both = old.clone()
    both[7:15] = new[7:15]
    usable = slice(8, 15)  # in either family

    def window_of(ids: torch.Tensor) -> torch.Tensor:
        memory = model.new_memory()
        memory.full(old)
        return memory.window(ids, 7, 15)[usable]

    assert_same(window_of(new), window_of(both))  # outside it is as it was
    for exact in (model.logits(both), model.logits(old)):
        assert (window_of(both) - exact[usable]).abs().amax() > 1e-3


def test_a_memory_needs_a_full_forward_first(tmp_path: Path) -> None:
    model = written("llada", tmp_path, num_layers=1)
    for memory in (model.new_memory(), TokenMemory(model.raw_logits, False)):
        with pytest.raises(ValueError, match="full forward"):
            memory.window(torch.arange(40, 44), 0, 2)
        memory.full(torch.arange(40, 44))
        with pytest.raises(ValueError, match="same canvas"):
            memory.window(torch.arange(40, 45), 0, 2)
        with pytest.raises(ValueError, match="rows 2 to 2"):
            memory.window(torch.arange(40, 44), 2, 2)


def test_token_memory() -> None:
    def spelled(ids: torch.Tensor) -> torch.Tensor:
        """Each row tells its position and the whole canvas as a number."""
        number = int("".join(map(str, ids.tolist())))
        return torch.tensor([[float(i), number] for i in range(len(ids))])

    def told(logits: torch.Tensor) -> list[tuple[int, int] | None]:
        rows = logits.tolist()
        return [None if a != a else (int(a), int(b)) for a, b in rows]

    plain, shifted = TokenMemory(spelled, False), TokenMemory(spelled, True)
    first, second = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    assert told(plain.full(first)) == [(i, 1234) for i in range(4)]
    assert told(shifted.full(first)) == [(i, 1234) for i in (0, 0, 1, 2)]
    # Rows 1 and 2 predict 1 and 2, or one later.
    assert told(plain.window(second, 1, 3)) == [None, (1, 1674), (2, 1674), None]
    assert told(shifted.window(second, 1, 3)) == [None, None, (1, 1674), (2, 1674)]
    # Row 0 predicts 0 in either case; the last row nothing where it is shifted.
    assert told(plain.window(second, 0, 1)) == [(0, 5674), None, None, None]
    assert told(shifted.window(second, 0, 1)) == [(0, 5674), (0, 5674), None, None]
    assert told(shifted.window(first, 3, 4)) == [None] * 4
    assert told(shifted.window(first, 1, 2)) == [None, None, (1, 5274), None]
    assert first.tolist() == [1, 2, 3, 4]  # the caller's canvas is left alone


def test_what_was_not_computed_decides_nothing() -> None:
    class Short(Script):
        """Its memory forgets the last row of each window."""

        def new_memory(self) -> Any:
            memory = super().new_memory()
            window = memory.window
            memory.window = lambda ids, lo, hi: window(ids, lo, hi - 1)
            return memory

    frame = [(1, 0.9), (1, 0.5), (1, 0.5), (1, 0.5)]
    for name in ("FastDLLM", "LLaDA", "EntropyThreshold", "FullAttnMultiBlock"):
        with pytest.raises(AssertionError, match="position 3 is outside"):
            decode(name, Short("llada", frame), cache="dual")


# Eight tokens behind a prompt of two, in blocks [2, 6) and [6, 10). The first is a bit
# surer than the next and so on, so every forward commits the lowest one left.
BLOCK_WISE = ("FastDLLM", "LLaDA", "LocalLeap", "Hierarchical", "Credit")
AROUND = {"prefix_look": 1, "after_look": 2, "warmup": 2}


def one_by_one(family: str, name: str, **options: Any) -> Result:
    model = says(family, *[0.5 - i / 100 for i in range(8)], prompt_len=2)
    result, steps = decode(name, model, block_size=4, **options)
    assert steps[:-1] == [[i] for i in range(len(steps) - 1)]
    return result


# fmt: off
SCHEDULES: dict[str, tuple[str, dict[str, Any], list[Window | None]]] = {
    "prefix": ("llada", {}, [FULL, *[(2, 10)] * 3, FULL, *[(6, 10)] * 3]),
    "prefix shifted": ("dream", {}, [FULL, *[(1, 10)] * 3, FULL, *[(5, 10)] * 3]),
    "dual": ("llada", {}, [FULL, *[(2, 6)] * 3, FULL, *[(6, 10)] * 3]),
    "dual shifted": ("dream", {}, [FULL, *[(1, 6)] * 3, FULL, *[(5, 10)] * 3]),
    # Windows end at 8 and, but for the canvas's end, at 12.
    # Two forwards warm up, the third fills the cache.
    "vicinity": (
        "llada", AROUND, [*[FULL] * 3, (1, 8), FULL, *[(5, 10)] * 3]),
    "vicinity shifted": (
        "dream", AROUND, [*[FULL] * 3, (0, 8), FULL, *[(4, 10)] * 3]),
    # The cache is filled at 7, in the second block. The third iteration there would
    # refresh it, but the block is done.
    "vicinity warm": (
        "llada", AROUND | {"warmup": 6}, [*[FULL] * 7, (5, 10)]),
    # Filled at 5, a window at 6, and again at 7. The looks of 16 reach over all of this
    # canvas: windows nevertheless.
    "vicinity default": (
        "llada", {}, [*[FULL] * 5, (0, 10), FULL, (0, 10)]),
    # Delay 2, refresh 3. The prompt waits at 1 and is computed last at 2. 3: a third
    # one. 4: from the prompt's end. 5, 6: the first block is done and waits. 7: it is
    # computed last. 8: from its end.
    "delayed": (
        "llada", {}, [FULL, FULL, FULL, (2, 10), FULL, FULL, (2, 10), (6, 10)]),
    # Delay 1, no refresh. The prompt is computed last at 1. 5: the first block waits.
    "delayed shifted": (
        "dream", {}, [FULL, *[(1, 10)] * 3, FULL, (1, 10), *[(5, 10)] * 2]),
    # Every fourth one is full as well.
    "delayed refreshed": (
        "dream", {"refresh_interval": 4},
        [FULL, *[(1, 10)] * 2, FULL, FULL, (1, 10), (5, 10), FULL]),
    # A block that is ready, at 6, goes before the refresh.
    "delayed ready at a refresh": (
        "dream", {"refresh_interval": 6},
        [FULL, *[(1, 10)] * 3, FULL, (1, 10), *[(5, 10)] * 2]),
    # A finished block is computed last in the very next forward: no block ever waits.
    "delayed by nothing": (
        "llada", {"cache_delay_iter": 0, "refresh_interval": 100},
        [FULL, *[(2, 10)] * 4, *[(6, 10)] * 3]),
}
# fmt: on


@pytest.mark.parametrize("name", [*BLOCK_WISE, "EntropyThreshold"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(name: str, schedule: str) -> None:
    family, options, want = SCHEDULES[schedule]
    result = one_by_one(family, name, cache=schedule.split()[0], **options)
    assert result.windows == want
    if name == "FastDLLM" and schedule == "delayed":
        assert (result.tokens_computed, result.tokens_cached) == (50 + 16 + 4, 10)
        assert result.full_refreshes == 5


@pytest.mark.parametrize("name", [*BLOCK_WISE, "EntropyThreshold"])
def test_the_forward_that_commits_the_rest_is_full(name: str) -> None:
    result = one_by_one("llada", name, cache="dual", max_forwards=3)
    assert result.windows == [FULL, (2, 6), FULL] and result.full_refreshes == 2
    assert result.trace[2].committed == [*range(2, 8)]


def test_short_last_block_and_no_prompt() -> None:
    model = says("dream", *[0.5] * 6)
    result, _ = decode("FastDLLM", model, block_size=4, cache="dual")
    assert result.windows == [FULL, *[(0, 4)] * 3, FULL, (3, 6)]


@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity", "delayed"])
def test_multi_block_spans(cache: str) -> None:
    """The second block is opened when the first has 2 of 4: the span grows with it."""
    options = {"prefix_look": 0, "after_look": 1, "warmup": 0, "early_stop": False}
    options |= {"block_add_threshold": 0.5, "decoded_token_threshold": 1.0}
    result = one_by_one("llada", "FullAttnMultiBlock", cache=cache, **options)
    if cache == "delayed":
        assert result.windows == SCHEDULES["delayed"][2]
        return
    second = {"prefix": (2, 10), "dual": (2, 6), "vicinity": (2, 7)}[cache]
    want = [FULL, second, *[(2, 10)] * 2, FULL, *[(6, 10)] * 3]
    assert result.windows == want


def test_multi_block_spans_start_at_the_first_candidate() -> None:
    # Blocks [2, 5), [5, 8), [8, 10): the second is open at 1, the third at 2. At 1 two
    # pass, in two blocks; then the best of all and one of the first unfinished block.
    model = says("llada", 0.6, 0.99, 0.5, 0.3, 0.99, 0.3, 0.4, 0.2, prompt_len=2)
    options = {"block_size": 3, "early_stop": False, "cache": "dual"}
    options |= {"block_add_threshold": 0.0, "decoded_token_threshold": 1.0}
    result, steps = decode("FullAttnMultiBlock", model, **options)
    assert steps == [[1, 4], [0], [2], [3, 6], [5], [7]]
    assert result.windows == [FULL, (2, 10), (2, 10), FULL, (5, 10), FULL]
    assert result.trace[0].candidates == [*range(6)]


def test_stale_candidates_have_logits() -> None:
    """The forward that first sees an EOS has candidates behind it, in the window."""
    frame = [(1, 0.5), (EOS, 0.99), (1, 0.4), (1, 0.4), *[(1, 0.3)] * 4]
    model = Script("llada", frame, prompt_len=2)
    options = {"block_size": 4, "threshold": 0.2, "early_stop": True, "cache": "dual"}
    options |= {"block_add_threshold": 0.0}
    result = run("FullAttnMultiBlock", model, [0, 0], 8, options)
    assert result.windows == [FULL, (2, 10)]
    assert result.trace[1].candidates == [0, 2, 3, 4, 5, 6, 7]
    assert result.ids == [1, *[EOS] * 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_blocks_done_at_once(family: str) -> None:
    # Blocks [0, 2), [2, 4), [4, 6), [6, 8); the two in the middle are done before 2.
    shift = int(family == "dream")
    cache = Delayed(
        shift, 8, family=family, prompt_len=2, block_size=2, delay=1,
        refresh_interval=100,
    )  # fmt: skip
    masks = [[2, 3, 4, 5, 6, 7], *[[6, 7]] * 4]
    got = [cache.next_window(n, (0, 8), m) for n, m in enumerate(masks, start=1)]
    # LLaDA's delay of the second starts when the first is over.
    assert got == {
        "llada": [FULL, FULL, (2, 8), (4, 8), (6, 8)],
        "dream": [FULL, FULL, (1, 8), (5, 8), (5, 8)],
    }[family]  # fmt: skip


@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("dream", 1)])
@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity"])
def test_ada_block(family: str, shift: int, cache: str) -> None:
    """The window of `test_ada_block`: blocks of 3, 2, 5, 5 and 1 behind one token."""
    newlines = {1: 0.35, 2: 0.6, 4: 0.8}
    frame = [(NEWLINE, newlines[i]) if i in newlines else (1, 0.5) for i in range(16)]
    frame[3] = frame[7] = (1, 0.95)
    options = {"block_size": 5, "delimiter_threshold": 0.5, "cache": cache}
    options |= {"prefix_look": 0, "after_look": 0, "warmup": 0}
    model = Script(family, frame, prompt_len=1)
    result, _ = decode("AdaBlock", model, **options)
    want: list[Window | None] = []
    for start, end in ((1, 4), (4, 6), (6, 11), (11, 16), (16, 17)):
        hi = 17 if cache == "prefix" else end
        want += [FULL, *[(start - shift, hi)] * (end - start - 1)]
    assert result.windows == want


def test_fast_dllm_on_dream_is_block_wise_with_a_cache() -> None:
    model = says("dream", *[0.95] * 40, prompt_len=1)
    for more in ({}, {"steps": 7}):
        result, steps = decode("FastDLLM", model, cache="dual", **more)
        assert steps == [[*range(32)], [*range(32, 40)]]
        assert result.windows == [FULL, FULL]
    # Without one: by quota, as ever.
    assert decode("FastDLLM", model, cache="none")[0].ids == [1] * 40
    _, steps = decode("FastDLLM", model, cache="none", steps=2)
    assert steps == [[*range(20)], [*range(20, 40)]]
    with pytest.raises(ValueError, match="block_size"):
        decode("FastDLLM", model, cache="none", block_size=32)


def test_where_there_is_no_cache() -> None:
    result = one_by_one("llada", "FastDLLM", cache="none")
    assert (result.tokens_computed, result.tokens_cached) == (80, 0)
    assert result.full_refreshes == 0 and result.windows == [FULL] * 8
    for family, name, options in (
        ("dream", "Dream", {"cache": "prefix"}),
        ("llada", "AdaptiveParallel", {"cache": "dual"}),
        ("llada", "LLaDA", {"cache": "dual", "cfg_scale": 1.0}),
        ("llada", "AdaBlock", {"cache": "delayed"}),
        ("llada", "FastDLLM", {"cache": "infix"}),
    ):
        with pytest.raises(ValueError):
            run(name, says(family, 0.5), [], 1, options)


def toy_run(family: str, name: str, seed: int, **options: Any) -> Result:
    model = TokenModel(random_rows(seed), family == "dream")
    if "block_size" in DEFAULTS[family][name] or options["cache"] != "none":
        options = {"block_size": 5, **options}
    return run(
        name, model, [0, MASK, 3], 21, options,
        family=family, mask_id=MASK, eos_id=EOS, delimiter_ids=[NEWLINE],
    )  # fmt: skip


@pytest.mark.parametrize(("family", "name"), CACHED)
def test_windows_of_the_whole_canvas_change_nothing(family: str, name: str) -> None:
    num_windows = 0
    for seed in range(3):
        looks = {"prefix_look": 99, "after_look": 99, "warmup": 0}
        wide = toy_run(family, name, seed, cache="vicinity", **looks)
        full = toy_run(family, name, seed, cache="vicinity", warmup=999)
        assert wide.trace == full.trace and wide.ids == full.ids
        assert full.windows == [FULL] * full.nfe
        num_windows += wide.windows.count((0, 24))
        if (family, name) != ("dream", "FastDLLM"):  # its loop is another one
            none = toy_run(family, name, seed, cache="none")
            assert wide.trace == none.trace and wide.ids == none.ids
    assert num_windows > 0


@pytest.mark.parametrize(("family", "name"), CACHED)
@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity", "delayed"])
def test_no_decision_needs_what_is_not_computed(
    family: str, name: str, cache: str
) -> None:
    if (name, cache) == ("AdaBlock", "delayed"):
        pytest.skip("not offered")
    looks = {"prefix_look": 1, "after_look": 2, "warmup": 1}
    num_reused = 0
    for seed in range(4):
        limit = {"max_forwards": 6} if seed == 3 else {}
        result = toy_run(family, name, seed, cache=cache, **looks, **limit)
        assert MASK not in result.ids
        assert result.tokens_computed + result.tokens_cached == 24 * result.nfe
        assert result.full_refreshes == result.windows.count(FULL) >= 1
        assert len(result.windows) == result.nfe
        num_reused += result.tokens_cached
    assert num_reused > 0


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_end_to_end(tmp_path: Path, checkpoint: str) -> None:
    """Keys and values in a whole run: wide windows are exact, narrow ones are not."""
    model = written(checkpoint, tmp_path, num_layers=2)
    options = {"block_size": 8, "threshold": 1.0, "early_stop": False}

    def decoded(**cache: Any) -> Result:
        prompt = [40, 41, model.mask_id, 50]
        return run("FullAttnMultiBlock", model, prompt, 24, options | cache)

    none = decoded()
    wide = decoded(cache="vicinity", prefix_look=99, after_look=99, warmup=0)
    assert (wide.ids, wide.commit_order) == (none.ids, none.commit_order)
    for cache in ("prefix", "dual", "vicinity", "delayed"):
        cached = decoded(cache=cache, prefix_look=2, after_look=2)
        assert model.mask_id not in cached.ids and cached.tokens_cached > 0
