"""The models' own samplers, LLaDA `generate` and Dream `diffusion_generate`.

Written from docs/algorithms.md, section "The models' own samplers"; what they share
with the others is in `reference.canvas`. Options have to be complete; defaults are
filled in by `reference.algorithms.run`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from reference.canvas import GREEDY, Canvas, Guess, Sampling, rank_gap, ranked, share
from reference.memory import LogitsFn
from reference.record import Result

DREAM_ENTROPY_EPS = 1e-10
SMALLEST_UNIFORM = 1e-300  # ln(0) is no Gumbel number


def llada(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    unconditional: LogitsFn | None = None,
    **facts: Any,
) -> Result:
    """A fixed number of steps per block, each committing its share of the block.

    `unconditional` predicts from the canvas without anything given, for guidance; it is
    the model itself unless given. It is the same forward, so `nfe` counts one.
    """
    canvas = Canvas(model, prompt_ids, max_new_tokens, sampling, options, **facts)
    # The steps are shared out among the blocks that have something to decode.
    blocks = [b for b in canvas.blocks(options["block_size"]) if canvas.masked(*b)]
    steps = max_new_tokens if options["steps"] is None else options["steps"]
    if steps < len(blocks):
        raise ValueError(f"{steps} steps for {len(blocks)} blocks")
    shares = share(steps, len(blocks)) if blocks else []
    for (start, end), block_steps in zip(blocks, shares, strict=True):
        num_masks = len(canvas.masked(start, end))
        few, num_more = divmod(num_masks, block_steps)
        # The first steps commit one more. Words may keep tokens back for later steps.
        while candidates := canvas.masked(start, end):
            done = num_masks - len(candidates)
            quota = few + (done < num_more * (few + 1))
            logits = canvas.forward((start, end))
            scale = options["cfg_scale"]
            if scale > 0:
                pairs = zip(canvas.ids, canvas.given, strict=True)
                ids = [canvas.mask_id if given else i for i, given in pairs]
                blind = (unconditional or model)(torch.tensor(ids)).double()
                logits = blind + (scale + 1) * (logits - blind)
            if options["logits_eos_inf"]:
                logits[:, canvas.eos_id] = -torch.inf
            guesses = canvas.guesses(logits, candidates)
            if options["remasking"] == "random":
                order = ranked({i: canvas.uniform("order", i) for i in candidates})
                gaps = []
            else:
                gaps = canvas.draw_gaps(guesses)
                ends: list[int] = []
                if options["confidence_eos_eot_inf"]:
                    ends = [canvas.eos_id]
                    ends += [] if canvas.eot_token_id is None else [canvas.eot_token_id]
                    # A predicted end drops from anywhere to the last rank.
                    gaps += [guess.gap for guess in guesses.values()]
                values = _confidences(canvas.edits.rows(canvas, logits), guesses, ends)
                order = ranked(values)
                gaps += rank_gap(values, order, quota)
            canvas.commit(order[:quota], guesses, logits, gaps)
    return canvas.result()


def _confidences(
    logits: torch.Tensor, guesses: dict[int, Guess], ends: list[int]
) -> dict[int, float]:
    """LLaDA's own rule on any model: the share of x0 in the row, less the `ends`.

    An x0 that is one of the ends has 0.
    """
    values = {}
    for i, guess in guesses.items():
        row = logits[i].clone()
        row[ends] = -torch.inf
        values[i] = float(torch.softmax(row, dim=-1)[guess.token])
    return values


def dream(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    **facts: Any,
) -> Result:
    """No blocks: each step commits the best of the canvas, by a schedule of times."""
    canvas = Canvas(model, prompt_ids, max_new_tokens, sampling, options, **facts)
    steps = canvas.decoded_len if options["steps"] is None else options["steps"]
    alg, alg_temp = options["alg"], options["alg_temp"]
    # float32 on purpose, and torch's own linspace: the truncation below depends on it.
    times = torch.linspace(1, options["eps"], steps + 1, dtype=torch.float32)
    step = -1
    # Words may keep tokens back in the last step, which is then run again.
    while candidates := canvas.masked():
        step = min(step + 1, steps - 1)
        last = step == steps - 1
        rate = 1 - times[step + 1] / times[step]
        quota = len(candidates) if last else int(len(candidates) * rate)
        if alg == "origin":
            logits = canvas.forward()
            guesses = canvas.guesses(logits, candidates)
            # Only the x0 of those committed matter: u and p know no logits.
            chosen = [
                i
                for i in candidates
                if last or canvas.uniform("order", i) < float(rate)
            ]
            canvas.commit(chosen, guesses, logits, [])
            continue
        if quota == 0:
            continue
        logits = canvas.forward()
        guesses = canvas.guesses(logits, candidates)
        values = {i: _value(alg, guess, canvas.mask_id) for i, guess in guesses.items()}
        if alg_temp > 0:
            # The largest sums of ln p and Gumbel noise: drawn without replacement.
            for i in candidates:
                u = max(canvas.uniform("order", i), SMALLEST_UNIFORM)
                values[i] = values[i] / alg_temp - math.log(-math.log(u))
        order = ranked(values)
        gaps = canvas.draw_gaps(guesses) + rank_gap(values, order, quota)
        canvas.commit(order[:quota], guesses, logits, gaps)
    return canvas.result()


def _value(alg: str, guess: Guess, mask_id: int) -> float:
    """The value by which Dream ranks a position; more is better."""
    probs = guess.probs
    if alg == "maskgit_plus":
        return float(probs[guess.token])
    if alg == "topk_margin":
        tokens = probs.clone()
        tokens[mask_id] = -1.0
        best, second = tokens.topk(2).values.tolist()
        return best - max(second, 0.0)
    if alg == "entropy":
        return float((probs * torch.log(probs + DREAM_ENTROPY_EPS)).sum())
    raise ValueError(f"alg: {alg}")
