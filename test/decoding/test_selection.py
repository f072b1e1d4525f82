"""The unmasking rule at its edges: equality, ties, forced progress, ragged batches."""

from __future__ import annotations

import torch

from sglang_dllm.decoding.algorithms.full_attn_multi_block import certain_enough

INF = float("inf")


def select(
    entropy: list[float],
    forced: list[bool],
    threshold: float,
    *,
    llada: bool,
    canvases: list[int] | None = None,
) -> list[bool]:
    index = torch.tensor(canvases or [0] * len(entropy))
    return certain_enough(
        torch.tensor(entropy, dtype=torch.float64),
        index,
        torch.tensor(forced),
        torch.full((len(entropy),), threshold, dtype=torch.float64),
        int(index.max()) + 1,
        is_llada=llada,
    ).tolist()


def test_at_the_threshold_llada_accepts_and_dream_does_not() -> None:
    entropy, forced = [0.25, 0.5, 0.75], [False] * 3
    assert select(entropy, forced, 0.5, llada=True) == [True, True, False]
    assert select(entropy, forced, 0.5, llada=False) == [True, False, False]


def test_llada_always_takes_the_first_global_minimum() -> None:
    entropy, forced = [0.9, 0.7, 0.7], [False] * 3
    assert select(entropy, forced, 0.1, llada=True) == [False, True, False]
    assert select(entropy, forced, 0.1, llada=False) == [False] * 3


def test_a_forced_block_moves_by_its_first_minimum_unless_it_moved() -> None:
    forced = [False, True, True, True]
    assert select([0.0, 3, 2, 2], forced, 0.1, llada=False) == [
        True,
        False,
        True,
        False,
    ]
    assert select([0.0, 0.05, 2, 2], forced, 0.1, llada=False) == [
        True,
        True,
        False,
        False,
    ]


def test_infinite_entropies_still_make_progress() -> None:
    assert select([INF, INF], [True, True], 0.5, llada=False) == [True, False]
    assert select([INF, INF], [True, True], 0.5, llada=True) == [True, False]


def test_canvases_of_a_batch_do_not_see_each_other() -> None:
    chosen = select(
        [0.9, 0.8, 0.1, 0.7, 0.6],
        [True] * 5,
        0.05,
        llada=True,
        canvases=[0, 0, 1, 2, 2],
    )
    assert chosen == [False, True, True, False, True]
