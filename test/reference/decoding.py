"""The published entropy-threshold loops, one request and one forward at a time.

`single_block` is d3LLM `generate` (LLaDA) and `_sample` (Dream), the loop of dParallel
and Fast-dLLM with an entropy rule. `multi_block` is d3LLM `generate_multi_block`
(LLaDA) and `_sample_multi_block` (Dream); their KV cache is one of `reference.cache`.
Temperature is 0. Plain lists and scalars: written to be compared with the papers, not
to be fast.

Logits come from any callable `logits_fn(ids: (L,) int64) -> (L, V)` whose row i
predicts position i (Dream's right shift is already in it, see `reference.models`), so
recorded or random logits can be replayed.

Departures from the published code, on purpose:

(a) The number of blocks is ceil(G/B) and the last block is short, its `total` being
    its own size. (Published: floor; the tail is never decoded.)
(b) The mask id is never chosen: the argmax skips it. Only the argmax does: the entropy
    is over the whole row, mask id and padded rows included.
(c) Mask ids inside the prompt are ordinary text, never candidates.
(d) `nfe` counts forwards really run. (Published: one more when stopped by EOS.)
(e) The visible answer ends before the first EOS. With early stop every id behind the
    first EOS is reported as EOS. (Published: junk may stay there.)
(f) Single block: entropy is float64 with eps 1e-12 for both families (published
    Dream: model dtype, 1e-8), and the candidate of lowest entropy is always accepted,
    the first one on ties. Other candidates: LLaDA `H <= threshold`, Dream
    `H < threshold`. Single block with early stop has no published form: here the EOS
    rule runs at the top of each iteration, *before* the mask is read.

Kept as published in `multi_block`: the mask is read before the EOS rule runs (the
stale mask). In the iteration that sees a new first EOS, positions just filled with EOS
are still candidates; they are filled again at the next iteration. Consequences:

- A stale position can take the place of the one forced in the block of the EOS. That
  forward then moves nothing before the EOS, and the next one sees the same canvas: one
  forward wasted, same visible tokens. This is all that happens to Dream, and to LLaDA
  at add = decoded = 1, where it is the only difference to `single_block`.
- LLaDA with several live blocks: a stale global minimum displaces the one before the
  EOS, which is then decoded later on another canvas. Visible tokens can differ.

`stale_mask=False` reads the mask after the EOS rule, so that tests can show the above.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from reference.cache import Forwards, Span
from reference.edits import NONE, Edits, first_best
from reference.memory import LogitsFn, check_computed
from reference.record import Block, Forward, Result
from reference.template import Part, Template, behind_given, fill_in, run_forward

ENTROPY_EPS = 1e-12
MAX_FORWARDS = 10_000


def first_eos(ids: list[int], eos_id: int, ends_from: int = 0) -> int | None:
    """Index of the first EOS that ends the answer, or None."""
    return ids.index(eos_id, ends_from) if eos_id in ids[ends_from:] else None


def visible(result: Result, eos_id: int) -> list[int]:
    """The ids a reader gets: everything before the first EOS."""
    return result.ids[: first_eos(result.ids, eos_id, result.ends_from)]


def multi_block(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    block_size: int,
    threshold: float,
    block_add_threshold: float,
    decoded_token_threshold: float,
    early_stop: bool,
    max_forwards: int | None = None,
    family: str | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    stale_mask: bool = True,
    cache: dict[str, Any] | None = None,
    template: Template | None = None,
    part: Part | None = None,
    edits: Edits = NONE,
) -> Result:
    """d3LLM multi-block decoding. Facts left None are read from the model object.

    Step numbers in the body are those of d3LLM `generate_multi_block`. `cache` has the
    options of `reference.cache`; none without.
    """
    options = {**(cache or {}), "block_size": block_size, "max_forwards": max_forwards}
    facts = family, mask_id, eos_id, template, part, edits
    canvas = _Canvas(model, prompt_ids, max_new_tokens, options, *facts)
    prompt_len, canvas_len = canvas.prompt_len, len(canvas.ids)
    num_blocks = -(-max_new_tokens // block_size)
    if num_blocks == 0:
        return canvas.result(early_stop)

    def new_block(index: int) -> Block:
        start = prompt_len + (index - 1) * block_size
        end = min(start + block_size, canvas_len)
        # Given text counts as decoded.
        left = canvas.num_masked(start, end)
        return Block(start, end, left=left, total=end - start, active=False)

    blocks = [Block(0, prompt_len, left=0, total=prompt_len, active=True)]
    blocks.append(new_block(1))
    blocks[1].active = blocks[0].progress >= decoded_token_threshold
    next_block = 2

    while True:
        # 1-2: snapshot of the masks; finished once none is left.
        masked = canvas.masked()
        if not masked:
            break
        # 4: everything behind the first EOS becomes EOS.
        eos_at = canvas.fill_after_eos() if early_stop else None
        if eos_at is not None:
            while next_block <= num_blocks and new_block(next_block).start > eos_at:
                blocks.append(new_block(next_block))
                next_block += 1
            for block in blocks[1:]:
                if block.start > eos_at:
                    block.left, block.active = 0, True
                elif block.end > eos_at:
                    block.left = canvas.num_masked(block.start, eos_at + 1)
                    block.active = block.active or block.left == 0
                elif canvas.family == "dream":
                    block.left = canvas.num_masked(block.start, block.end)
            if not canvas.masked():
                break
        if not stale_mask:
            masked = canvas.masked()
        # 5: activation sweep, in order.
        for previous, block in pairwise(blocks):
            if not block.active and previous.progress >= decoded_token_threshold:
                block.active = True
        # 6: at most one new block per iteration, decoded in this same iteration.
        if next_block <= num_blocks and eos_at is None:
            last = blocks[-1]
            if last.progress >= block_add_threshold or last.left == 0:
                blocks.append(new_block(next_block))
                blocks[-1].active = last.progress >= decoded_token_threshold
                next_block += 1
        # If no block is left to decode, the next one with masks is created at once:
        # blocks that are given whole need no forward.
        while not any(i < blocks[-1].end for i in masked):
            blocks.append(new_block(next_block))
            blocks[-1].active = blocks[-2].progress >= decoded_token_threshold
            next_block += 1
        # 7-8: one forward over the whole canvas; candidates of all live blocks.
        active_end = max(b.end for b in blocks if b.active or b.left > 0)
        candidates = [i for i in masked if i < active_end]
        # Never empty: the first mask left is in a live block.
        first_block = (candidates[0] - prompt_len) // block_size
        first_start = prompt_len + first_block * block_size
        logits = canvas.forward((first_start, active_end))
        if canvas.nfe == max_forwards:
            canvas.commit_rest(logits, eos_at)
            break
        entropy = {i: _entropy(logits[i], i) for i in candidates}
        # 9: joint selection.
        contests: list[list[int]] = []
        if canvas.family == "llada":
            chosen = {i for i in candidates if entropy[i] <= threshold}
            if candidates and not chosen:
                # The global minimum is in `chosen` already unless that is empty.
                contests.append(candidates)
                chosen.add(min(candidates, key=entropy.__getitem__))
        else:
            chosen = {i for i in candidates if entropy[i] < threshold}
        # 10: the first unfinished active block always moves.
        for block in blocks:
            if block.active and block.left > 0:
                inside = [i for i in candidates if block.start <= i < block.end]
                if inside and not chosen.intersection(inside):
                    contests.append(inside)
                    chosen.add(min(inside, key=entropy.__getitem__))
                break
        # 11: commit. A stale position lowers `left` too, as published.
        chosen = canvas.commit(
            chosen, logits, entropy, threshold, contests=contests, eos_at=eos_at,
            blocks=[(b.left, b.active) for b in blocks],
        )  # fmt: skip
        for block in blocks:
            if block.left > 0:
                block.left -= sum(block.start <= i < block.end for i in chosen)
    return canvas.result(early_stop)


def single_block(
    model: LogitsFn,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    block_size: int,
    threshold: float,
    early_stop: bool,
    max_forwards: int | None = None,
    family: str | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    cache: dict[str, Any] | None = None,
    template: Template | None = None,
    part: Part | None = None,
    edits: Edits = NONE,
) -> Result:
    """Semi-autoregressive decoding: a block is finished before the next one starts."""
    options = {**(cache or {}), "block_size": block_size, "max_forwards": max_forwards}
    facts = family, mask_id, eos_id, template, part, edits
    canvas = _Canvas(model, prompt_ids, max_new_tokens, options, *facts)
    canvas_len = len(canvas.ids)
    for block_start in range(canvas.prompt_len, canvas_len, block_size):
        block_end = min(block_start + block_size, canvas_len)
        while True:
            eos_at = canvas.fill_after_eos() if early_stop else None
            candidates = [i for i in canvas.masked() if i < block_end]
            if not candidates:
                break
            logits = canvas.forward((block_start, block_end))
            if canvas.nfe == max_forwards:
                canvas.commit_rest(logits, eos_at)
                return canvas.result(early_stop)
            entropy = {i: _entropy(logits[i], i) for i in candidates}
            lowest = min(candidates, key=entropy.__getitem__)
            if canvas.family == "llada":
                chosen = {i for i in candidates if entropy[i] <= threshold}
            else:
                chosen = {i for i in candidates if entropy[i] < threshold}
            contests = [] if lowest in chosen else [candidates]
            chosen.add(lowest)
            canvas.commit(
                chosen, logits, entropy, threshold, contests=contests, eos_at=eos_at,
                blocks=[(len(candidates), True)],
            )  # fmt: skip
    return canvas.result(early_stop)


def _entropy(row: torch.Tensor, position: int) -> float:
    """row: (V,) float -> entropy in nats, float64 over every row of the LM head."""
    check_computed(row, position)
    probs = torch.softmax(row.to(torch.float64), dim=-1)
    return float(-(probs * torch.log(probs + ENTROPY_EPS)).sum())


class _Canvas:
    """Prompt and answer ids, with the record of who wrote what. No decisions."""

    def __init__(
        self,
        model: Any,
        prompt_ids: list[int],
        max_new_tokens: int,
        options: dict[str, Any],
        family: str | None,
        mask_id: int | None,
        eos_id: int | None,
        template: Template | None,
        part: Part | None,
        edits: Edits,
    ) -> None:
        self.family: str = model.family if family is None else family
        self.mask_id: int = model.mask_id if mask_id is None else mask_id
        self.eos_id: int = model.eos_id if eos_id is None else eos_id
        if self.family not in ("llada", "dream"):
            raise ValueError(f"family: expected llada or dream, found {self.family}")
        self.prompt_len = len(prompt_ids)
        self.ids, self.given = fill_in(
            prompt_ids, max_new_tokens, self.mask_id, template, part
        )
        self.part, self.edits = part, edits
        self.written_by: list[int | None] = [None] * len(self.ids)
        self.trace: list[Forward] = []
        self.forwards = Forwards(
            model, options, family=self.family, prompt_len=self.prompt_len,
            canvas_len=len(self.ids), max_forwards=options["max_forwards"],
        )  # fmt: skip

    @property
    def nfe(self) -> int:
        return len(self.forwards.windows)

    def masked(self) -> list[int]:
        """Masked positions of the answer, ascending; the prompt has none (rule c)."""
        return [i for i in range(len(self.ids)) if self.is_masked(i)]

    def is_masked(self, i: int) -> bool:
        return self.ids[i] == self.mask_id and not self.given[i]

    def num_masked(self, start: int, end: int) -> int:
        return sum(map(self.is_masked, range(start, end)))

    def fill_after_eos(self) -> int | None:
        """Make everything behind the first EOS of the answer EOS; return where it is.

        The first EOS can move left from one call to the next.
        """
        ends_from = behind_given(self.given)
        end = len(self.ids) - (self.part.padding if self.part else 0)
        eos_at = first_eos(self.ids[:end], self.eos_id, ends_from)
        if eos_at is None:
            return None
        for i in range(eos_at + 1, len(self.ids)):
            self.ids[i] = self.eos_id
            self.written_by[i] = None
        return eos_at

    def forward(self, span: Span) -> torch.Tensor:
        """One forward over the whole canvas, future masks included: (L, V).

        With a cache maybe of a part only, as needed to decode `span`.
        """
        if self.nfe >= MAX_FORWARDS:
            raise RuntimeError(f"no end after {MAX_FORWARDS} forwards")
        self.unedited = run_forward(self, span)
        return self.edits.rows(self, self.unedited)

    def commit(
        self,
        chosen: set[int],
        logits: torch.Tensor,
        entropy: dict[int, float],
        threshold: float,
        *,
        contests: list[list[int]],
        eos_at: int | None,
        blocks: list[tuple[int, bool]],
        is_last: bool = False,
    ) -> list[int]:
        """Write the best token of every chosen position and trace the forward.

        `contests`: groups whose position of lowest entropy was chosen for progress.
        """
        tokens = {i: first_best(logits[i], self.mask_id) for i in chosen}
        tokens = self.edits.kept(self, tokens, self.unedited, is_last)
        committed = sorted(tokens)
        stale = [i for i in committed if not self.is_masked(i)]
        mask_argmax: list[int] = []
        gaps = [abs(h - threshold) for h in entropy.values()]
        for group in contests:
            ranked = sorted(entropy[i] for i in group)
            gaps += [b - a for a, b in pairwise(ranked[:2])]
        for i in committed:
            row = logits[i].clone()
            if int(row.argmax()) == self.mask_id:
                mask_argmax.append(i)
            row[self.mask_id] = -torch.inf
            best, runner_up = row.topk(2).values.tolist()
            gaps.append(best - runner_up)
            self.ids[i] = tokens[i]
            self.written_by[i] = self.nfe - 1

        def answer(positions: list[int]) -> list[int]:
            return [i - self.prompt_len for i in positions]

        self.trace.append(
            Forward(
                candidates=answer(list(entropy)),
                committed=answer(committed),
                stale=answer(stale),
                mask_argmax=answer(mask_argmax),
                forced=answer([min(g, key=entropy.__getitem__) for g in contests]),
                eos_at=None if eos_at is None else eos_at - self.prompt_len,
                blocks=blocks,
                margin=min(gaps, default=float("inf")),
            )
        )

        return committed

    def commit_rest(self, logits: torch.Tensor, eos_at: int | None) -> None:
        """Write the best token of every mask left: the last forward allowed."""
        rest = dict.fromkeys(self.masked(), 0.0)
        # No entropy decides anything, so none is close to a threshold.
        infinity = float("inf")
        self.commit(
            set(rest),
            logits,
            rest,
            infinity,
            contests=[],
            eos_at=eos_at,
            blocks=[],
            is_last=True,
        )

    def result(self, early_stop: bool) -> Result:
        if early_stop:
            self.fill_after_eos()
        answer = slice(self.prompt_len, None)
        return Result(
            self.ids[answer], self.nfe, self.written_by[answer], self.trace,
            ends_from=behind_given(self.given) - self.prompt_len,
            **self.forwards.record(),
        )  # fmt: skip
