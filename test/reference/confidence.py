"""The samplers that accept by confidence, one request and one forward at a time.

Written from docs/algorithms.md, section "By confidence"; what they share is in
`reference.canvas`. A rule takes the confidences of the candidates of one step and
gives the accepted positions with the gaps of that decision. Options have to be
complete; defaults are filled in by `reference.algorithms.run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from reference.canvas import (
    GREEDY,
    Canvas,
    Guess,
    Sampling,
    rank_gap,
    ranked,
    share,
)
from reference.memory import LogitsFn
from reference.record import Result

Confidences = dict[int, float]  # by position
Accepted = tuple[set[int], list[float]]  # positions, gaps
Rule = Callable[[Confidences], Accepted]

TOKENS_PER_STEP = 32  # Fast-dLLM on Dream: the share of one step by default
CREDIT_SLACK = 1e-5
WINDOW_SHARE = 0.25  # AdaBlock: the part of the answer that is searched for an end


def fast_dllm(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """Fast-dLLM: by threshold or factor; block-wise on LLaDA, by quota on Dream.

    With a cache Dream's is block-wise too, as published, and has no use for `steps`.
    """
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)

    def rule(confidence: Confidences) -> Accepted:
        if options["factor"] is not None:
            return _by_factor(confidence, options["factor"])
        return _by_threshold(confidence, options["threshold"])

    if canvas.family == "llada" or options["cache"] != "none":
        return _block_wise(canvas, options["block_size"], rule)

    steps = options["steps"]
    if steps is None:
        steps = -(-canvas.decoded_len // TOKENS_PER_STEP)
    shares = share(len(canvas.masked()), steps) if steps else []
    left = step = 0
    while candidates := canvas.masked():
        quota = left + (shares[step] if step < len(shares) else 0)
        step += 1
        logits = canvas.forward()
        guesses = canvas.guesses(logits, candidates)
        confidence = _confidences(guesses)
        order = ranked(confidence)
        accepted, gaps = rule({i: confidence[i] for i in order[:quota]})
        # Another last rank is another token only where that one was accepted.
        if order[quota - 1] in accepted:
            gaps += rank_gap(confidence, order, quota)
        gaps += canvas.draw_gaps(guesses)
        left = quota - len(canvas.commit(accepted, guesses, logits, gaps))
    return canvas.result()


def local_leap(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """LocalLeap: a lower threshold around the confident ones."""
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)
    anchor_threshold = options["anchor_threshold"]
    neighbor_threshold = options["neighbor_threshold"]

    def rule(confidence: Confidences) -> Accepted:
        # An acceptance at the lower threshold makes no new anchor.
        anchors = [i for i, c in confidence.items() if c >= anchor_threshold]
        accepted = set()
        gaps = [abs(c - anchor_threshold) for c in confidence.values()]
        for i, c in confidence.items():
            near = any(abs(i - anchor) <= options["radius"] for anchor in anchors)
            if near:
                gaps.append(abs(c - neighbor_threshold))
            if c >= (neighbor_threshold if near else anchor_threshold):
                accepted.add(i)
        return _with_best(confidence, accepted, gaps)

    return _block_wise(canvas, options["block_size"], rule)


def adaptive_parallel(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """The few best of the whole canvas, if above a threshold. No blocks."""
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)

    def rule(confidence: Confidences) -> Accepted:
        order = ranked(confidence)
        best_few = order[: options["max_parallel"]]
        accepted = {i for i in best_few if confidence[i] > options["threshold"]}
        gaps = [abs(confidence[i] - options["threshold"]) for i in best_few[1:]]
        if best_few[-1] in accepted:
            gaps += rank_gap(confidence, order, len(best_few))
        return _with_best(confidence, accepted, gaps)

    return _block_wise(canvas, max(1, max_new_tokens), rule)


def hierarchical(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """dInfer's hierarchy: the best of each run of masks at a lower threshold."""
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)
    threshold, low_threshold = options["threshold"], options["low_threshold"]

    def rule(confidence: Confidences) -> Accepted:
        accepted = {i for i, c in confidence.items() if c > threshold}
        gaps = [abs(c - threshold) for c in confidence.values()]
        for run in _runs(sorted(confidence)):
            best = max(confidence[i] for i in run)
            gaps.append(abs(best - low_threshold))
            if best > low_threshold:
                accepted.update(i for i in run if confidence[i] == best)
                below = [confidence[i] for i in run if i not in accepted]
                gaps += [best - max(below)] if below else []
        return _with_best(confidence, accepted, gaps)

    return _block_wise(canvas, options["block_size"], rule)


def credit(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """dInfer's credit: tokens predicted again and again gain confidence."""
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)
    for start, end in canvas.blocks(options["block_size"]):
        credits: dict[tuple[int, int], float] = {}  # by (position, token); else 0
        while candidates := canvas.masked(start, end):
            logits = canvas.forward((start, end))
            for key in credits:
                credits[key] *= options["decay_beta"]
            gaps = []
            for i in candidates:
                best = _argmax(canvas, canvas.edits.row(canvas, logits[i], i))
                gaps.append(best.gap)  # another token gains the credit
                boost = best.confidence ** options["boost_gamma"]
                credits[i, best.token] = credits.get((i, best.token), 0.0) + boost
            for (i, token), amount in credits.items():
                logits[i, token] += options["credit_alpha"] * math.log(1 + amount)
            guesses = canvas.guesses(logits, candidates)
            confidence = _confidences(guesses)
            order = ranked(confidence)
            bound = confidence[order[0]] - CREDIT_SLACK
            threshold = min(options["threshold"], bound)
            accepted = [i for i in order if confidence[i] >= threshold]
            # The best is accepted in any case.
            gaps += [abs(confidence[i] - threshold) for i in order[1:]]
            gaps += canvas.draw_gaps(guesses)
            canvas.commit(accepted, guesses, logits, gaps)
    return canvas.result()


def ada_block(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """AdaBlock: a block ends at a confident delimiter, if there is one."""
    canvas = _canvas(model, prompt_ids, max_new_tokens, options, sampling, facts)
    delimiters = options["delimiter_ids"]
    delimiters = canvas.delimiter_ids if delimiters is None else set(delimiters)
    window_size = int(WINDOW_SHARE * max_new_tokens)
    while rest := canvas.masked():  # all before them are done: a block starts here
        start = rest[0]
        # This forward shows where the block ends. It is full, since the start is new.
        logits = canvas.forward((start, len(canvas.ids)))
        window = canvas.guesses(logits, canvas.masked(start, start + window_size))
        ends = {i: g.confidence for i, g in window.items() if g.token in delimiters}
        length = options["block_size"]
        gaps = [guess.gap for guess in window.values()]
        if ends:
            order = ranked(ends)
            gaps.append(abs(ends[order[0]] - options["delimiter_threshold"]))
            if ends[order[0]] >= options["delimiter_threshold"]:
                length = order[0] - start + 1
                gaps += rank_gap(ends, order, 1)
        end = min(start + length, len(canvas.ids))
        candidates = canvas.masked(start, end)
        # They count as candidates of this forward, wherever the block ends.
        reach = start + max(window_size, options["block_size"])
        seen = canvas.guesses(logits, canvas.masked(start, reach))
        while candidates:
            guesses = canvas.guesses(logits, candidates)
            accepted, rule_gaps = _by_threshold(
                _confidences(guesses), options["threshold"]
            )
            gaps += rule_gaps + canvas.draw_gaps(guesses)
            canvas.commit(accepted, seen | guesses, logits, gaps)
            gaps, seen = [], {}
            candidates = canvas.masked(start, end)
            if candidates:
                logits = canvas.forward((start, end))
    return canvas.result()


def _canvas(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    options: dict[str, Any],
    sampling: Sampling,
    facts: dict[str, Any],
) -> Canvas:
    return Canvas(model, prompt_ids, max_new_tokens, sampling, options, **facts)


def _block_wise(canvas: Canvas, block_size: int, rule: Rule) -> Result:
    """Finish a block by `rule` before the next one starts."""
    for start, end in canvas.blocks(block_size):
        while candidates := canvas.masked(start, end):
            logits = canvas.forward((start, end))
            guesses = canvas.guesses(logits, candidates)
            accepted, gaps = rule(_confidences(guesses))
            canvas.commit(accepted, guesses, logits, gaps + canvas.draw_gaps(guesses))
    return canvas.result()


def _confidences(guesses: dict[int, Guess]) -> Confidences:
    return {i: guess.confidence for i, guess in guesses.items()}


def _argmax(canvas: Canvas, row: torch.Tensor) -> Guess:
    """The best token of a row and its probability, whatever the temperature."""
    probs = torch.softmax(row, dim=-1)
    tokens = row.clone()
    tokens[canvas.mask_id] = -torch.inf
    best, second = tokens.topk(2).values.tolist()
    token = int((tokens == best).nonzero()[0])
    return Guess(token, float(probs[token]), best - second, probs)


def _with_best(
    confidence: Confidences, accepted: set[int], gaps: list[float]
) -> Accepted:
    """The most confident one always, so that every step moves."""
    order = ranked(confidence)
    if order[0] not in accepted:
        accepted = accepted | {order[0]}
        gaps = gaps + rank_gap(confidence, order, 1)
    return accepted, gaps


def _by_threshold(confidence: Confidences, threshold: float) -> Accepted:
    """Fast-dLLM's rule, equal is enough."""
    accepted = {i for i, c in confidence.items() if c >= threshold}
    gaps = [abs(confidence[i] - threshold) for i in ranked(confidence)[1:]]
    return _with_best(confidence, accepted, gaps)


def _by_factor(confidence: Confidences, factor: float) -> Accepted:
    """Fast-dLLM's other rule: the more are taken, the surer each has to be.

    When only the very last one fails it is taken all the same, as published.
    """
    order = ranked(confidence)
    num_taken, gaps = len(order), []
    for rank in range(2, len(order)):
        bound = 1 - factor / (rank + 1)
        c = confidence[order[rank - 1]]
        gaps.append(abs(c - bound))
        if c < bound:
            num_taken = rank - 1
            break
    gaps += rank_gap(confidence, order, num_taken)
    return set(order[:num_taken]), gaps


def _runs(positions: list[int]) -> list[list[int]]:
    """Ascending positions -> the groups of neighbours among them."""
    runs = [positions[:1]]
    for previous, i in pairwise(positions):
        if i == previous + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs
