"""One denoising step of a mixed batch: rows to compute, then tokens to commit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from sglang_dllm.decoding.algorithm import (
    Algorithm,
    Choice,
    DecodingState,
    Judged,
    planned,
)
from sglang_dllm.decoding.canvas import IdArray


def sequences(states: Sequence[DecodingState]) -> list[IdArray]:
    """Token ids of every row of the next forward.

    The canvases in order, then the unconditional ones of those that have one.
    """
    return [
        *(state.canvas.ids for state in states),
        *(state.unconditional_ids() for state in states if state.is_guided),
    ]


def logits_rows(states: Sequence[DecodingState]) -> torch.Tensor:
    """Which rows of the packed hidden states predict the candidates.

    Args:
        states: canvases whose step has begun.

    Returns:
        ``(N + U,)`` int64 on the CPU: candidates of the sequences, in order.
    """
    owners = [*states, *(state for state in states if state.is_guided)]
    ends = accumulate(len(state.canvas) for state in owners)
    shift = states[0].facts.family.shift
    rows = [
        end - len(state.canvas) + np.maximum(planned(state).candidates - shift, 0)
        for state, end in zip(owners, ends, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def commit_step(logits: torch.Tensor, states: Sequence[DecodingState]) -> None:
    """Commit what one forward decides, in every canvas of the batch.

    Args:
        logits: ``(N + U, V)`` float, the rows named by ``logits_rows``.
        states: the same canvases in the same order; written in place.
    """
    groups = _by_algorithm(states)
    own, free = _rows_of(states)
    judged = [_judged(logits, states, g, own, free) for g in groups.values()]
    choices = [_choice(a, part) for a, part in zip(groups, judged, strict=True)]
    accepted, tokens, notes = _to_host(judged, choices)
    first = 0
    for number, state in enumerate(s for part in judged for s in part.states):
        candidates = planned(state).candidates
        rows = slice(first, first + len(candidates))
        first = rows.stop
        if state.failure is not None:
            continue
        chosen = accepted[rows]
        if state.is_last_forward:
            state.canvas.cut_short = not chosen.all()
            chosen = np.ones_like(chosen)
        try:
            state.commit(candidates[chosen], tokens[rows][chosen], int(notes[number]))
        except Exception as error:  # may be a third party's code
            state.fail(error)
        state.canvas.num_forwards += 1


def _choice(algorithm: Algorithm, judged: Judged) -> Choice:
    """What the algorithm decides; where it fails, its requests alone are given up."""
    try:
        choice = algorithm.choose(judged)
        shape = judged.positions.shape
        if not choice.accepted.shape == choice.tokens.shape == shape:
            raise ValueError(f"accepted and tokens must have the shape {tuple(shape)}")
        return choice
    except Exception as error:  # may be a third party's code
        for state in judged.states:
            state.fail(error)
        nothing = torch.zeros_like(judged.positions)
        return Choice(nothing.bool(), nothing)


def _by_algorithm(states: Sequence[DecodingState]) -> dict[Algorithm, list[int]]:
    """Which of the states each algorithm present decodes."""
    groups: dict[Algorithm, list[int]] = {}
    for index, state in enumerate(states):
        groups.setdefault(state.algorithm, []).append(index)
    return groups


def _rows_of(states: Sequence[DecodingState]) -> tuple[list[IdArray], list[IdArray]]:
    """Which rows of the logits are each canvas's own, and its unconditional one's."""
    counts = [len(planned(state).candidates) for state in states]
    counts += [n if s.is_guided else 0 for n, s in zip(counts, states, strict=True)]
    rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return rows[: len(states)], rows[len(states) :]


def _judged(
    logits: torch.Tensor,
    states: Sequence[DecodingState],
    group: list[int],
    own: list[IdArray],
    free: list[IdArray],
) -> Judged:
    """The part of the logits that one algorithm's canvases are decided by.

    Args:
        group: which of the states the algorithm decodes.
        own, free: as ``_rows_of`` says.
    """
    device = logits.device

    def on_device(parts: list[IdArray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    mine = [states[index] for index in group]
    candidates = [planned(s).candidates - s.canvas.prompt_len for s in mine]
    numbers = [np.full(len(part), i) for i, part in enumerate(candidates)]
    positions = on_device(candidates)
    # The canvases' own rows come first: alone in the batch, an algorithm needs no copy.
    is_alone = len(mine) == len(states)
    guided_rows = [free[i] for i in group] if any(s.is_guided for s in mine) else None
    return Judged(
        states=mine,
        logits=logits[: len(positions)]
        if is_alone
        else logits[on_device([own[i] for i in group])],
        canvas_index=on_device(numbers),
        positions=positions,
        unconditional=None if guided_rows is None else logits[on_device(guided_rows)],
        facts=mine[0].facts,
    )


def _to_host(
    judged: Sequence[Judged], choices: Sequence[Choice]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accepted and tokens of all candidates, notes of all canvases, group by group.

    The one place where a step waits for the device.
    """
    num = sum(len(choice.tokens) for choice in choices)
    device = choices[0].tokens.device
    packed = torch.cat(
        [
            *(choice.accepted.long() for choice in choices),
            *(choice.tokens for choice in choices),
            *(
                torch.zeros(part.num_canvases, dtype=torch.int64, device=device)
                if choice.notes is None
                else choice.notes
                for part, choice in zip(judged, choices, strict=True)
            ),
        ]
    )
    host = packed.cpu().numpy()
    return host[:num].astype(bool), host[num : 2 * num], host[2 * num :]
