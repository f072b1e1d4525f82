"""Breaking a step: what is packed into a forward, and what is committed after it."""

from __future__ import annotations

from mutations.mutation import (
    BY_ENTROPY,
    CANVASES,
    DECODER,
    DECODING,
    EDGES,
    EVERY,
    LAYOUT,
    SHARED,
    Mutation,
    each,
    without,
)

CACHED = without("Dream", "AdaptiveParallel")
PACKED = tuple(
    f"{SHARED}each_canvas_of_a_batch_is_packed_and_read_by_itself[{family}]"
    for family in ("llada", "dream")
)
COUNTED = f"{SHARED}the_rows_of_windows_are_counted"
IN_A_CROWD = "an answer depends on who else is in the batch"


def layout(
    name: str, algorithms: tuple[str, ...], old: str, new: str, notice: str, *tests: str
) -> Mutation:
    return Mutation(f"layout: {name}", algorithms, LAYOUT, old, new, notice, tests)


def decoder(
    name: str, algorithms: tuple[str, ...], old: str, new: str, notice: str, *tests: str
) -> Mutation:
    return Mutation(f"decoder: {name}", algorithms, DECODER, old, new, notice, tests)


STEP_MUTATIONS = (
    decoder(
        "the next forward computes the step before",
        EVERY,
        "self._layout.expect(groups)",
        "pass",
        "nothing that is committed is seen: gibberish",
        *PACKED,
    ),
    Mutation(
        "logits: of a part, from the batch's first",
        EVERY,
        "decoding/logits.py",
        "slice(first + start, first + stop)",
        "slice(start, stop)",
        IN_A_CROWD,
        (*PACKED,),
    ),
    Mutation(
        "logits: a statistic of a part, from the batch's first",
        EVERY,
        "decoding/logits.py",
        "(tokens[here], values[here])",
        "(tokens[:num], values[:num])",
        IN_A_CROWD,
        (f"{DECODING}a_forward_may_know_the_statistics",),
    ),
    Mutation(
        "logits: what is known of others",
        ("LLaDA", "Credit"),
        "decoding/logits.py",
        "return Logits(self.num_rows, self.vocab_size, of)",
        "return Logits(self.num_rows, self.vocab_size, of, self.measured)",
        "with CUDA graphs, credit and guidance change nothing",
        (f"{DECODING}a_forward_may_know_the_statistics",),
    ),
    layout(
        "rows counted from the canvas's start",
        CACHED,
        " - shift - start",
        " - shift",
        "with a cache, a position gets the token of another: gibberish",
        *PACKED,
    ),
    layout(
        "the least row is the batch's first",
        EVERY,
        "= first + ahead, first, last",
        "= first + ahead, 0, last",
        "with an empty prompt Dream's first token is another request's",
        *each("dream_reads_row_0_for_the_first_position", EVERY),
    ),
    layout(
        "the group's first answer for all",
        EVERY,
        "answers.append(first + index * canvases.max_answer_len)",
        "answers.append(first)",
        IN_A_CROWD,
        *PACKED,
    ),
    layout(
        "the batch's first answers for all groups",
        EVERY,
        "            first += len(canvases) * canvases.max_answer_len\n",
        "",
        IN_A_CROWD,
        *PACKED,
    ),
    layout(
        "the batch's first rows for all groups",
        EVERY,
        "group.first, group.uncond_offset = num, num_free",
        "group.first, group.uncond_offset = 0, num_free",
        IN_A_CROWD,
        *PACKED,
    ),
    layout(
        "the unconditional rows before the canvases'",
        ("LLaDA",),
        "num_free = sum(_num_known(canvases) for canvases, _ in groups)\n",
        "num_free = 0\n",
        "cfg_scale changes nothing",
        f"{EDGES}llada_guidance",
    ),
    layout(
        "candidates that became more are left out",
        ("FullAttnMultiBlock",),
        "if sum(counts) > len(expected.rows):",
        "if not expected:",
        "answers of several blocks end with an error",
        "test_algorithms.py::test_more_candidates_than_were_looked_for[1-llada]",
    ),
    layout(
        "the answer written over the prompt",
        EVERY,
        "first = max(start, prompt_len)",
        "first = start",
        "answers that do not know the question",
        f"{EDGES}llada_guidance",
        *PACKED,
    ),
    layout(
        "packed once",
        EVERY,
        "        self.input_ids[self._answer_at] = answers[self._answer_from]\n",
        "",
        "a forward does not see what the last one committed: gibberish",
        f"{EDGES}llada_guidance",
        *PACKED,
    ),
    layout(
        "kept for another window",
        CACHED,
        "(id(canvas), canvas.window) for canvas",
        "(id(canvas), (0, 0)) for canvas",
        "with a cache, tokens at the wrong positions: gibberish",
        f"{SHARED}windows_of_a_cache",
    ),
    decoder(
        "what comes goes along at once",
        EVERY,
        "        if self._is_laid_out:\n            self._arrived",
        "        if False:\n            self._arrived",
        "a request that comes while a forward runs ends the server",
        f"{DECODING}a_canvas_that_comes_while_a_forward_runs_waits_for_it[False]",
        f"{DECODING}a_canvas_that_comes_while_a_forward_runs_waits_for_it[True]",
    ),
    decoder(
        "what comes back goes on with its window",
        EVERY,
        "group.windows = (torch.zeros_like(length), length)",
        "pass",
        "a retracted request with a cache attends to another's keys",
        f"{DECODING}a_canvas_that_comes_while_a_forward_runs_waits_for_it[True]",
    ),
    decoder(
        "cut short by any last forward",
        EVERY,
        "left_out = last[canvas] & ~accepted",
        "left_out = last[canvas]",
        "max_forwards_reached though nothing was left",
        f"{SHARED}a_canvas_is_cut_short_where_the_last_forward_had_to_commit",
    ),
    decoder(
        "cut short by any forward",
        EVERY,
        "left_out = last[canvas] & ~accepted",
        "left_out = ~accepted",
        "max_forwards_reached of every request",
        f"{SHARED}a_canvas_is_cut_short_where_the_last_forward_had_to_commit",
    ),
    decoder(
        "never cut short",
        EVERY,
        "canvases.cut_short = canvases.cut_short | cut_short",
        "canvases.cut_short = canvases.cut_short & cut_short",
        "max_forwards_reached is never true",
        f"{SHARED}a_canvas_is_cut_short_where_the_last_forward_had_to_commit",
    ),
    decoder(
        "the last forward commits what is accepted",
        EVERY,
        "accepted = accepted | last[canvas]",
        "accepted = accepted.clone()",
        "a request goes on behind its max_forwards",
        *each("the_last_of_max_forwards_commits_all_that_is_left", EVERY),
    ),
    decoder(
        "filled positions are counted as committed",
        BY_ENTROPY,
        "count(accepted & were_masked, ",
        "count(accepted, ",
        "more tokens decoded than there are",
        *(
            f"{SHARED}early_stop_fills_and_the_filled_compete_once[{name}]"
            for name in BY_ENTROPY
        ),
    ),
    decoder(
        "all predictions are written",
        EVERY,
        "torch.where(accepted, choice.tokens, before)",
        "choice.tokens",
        "a position is decided over guesses for the others",
        f"{EDGES}llada_guidance",
        *PACKED,
    ),
    decoder(
        "a forward for what an EOS filled",
        BY_ENTROPY,
        "    step = algorithm.plan(canvases)\n"
        "    # Not before: planning may have filled what was left behind an EOS.\n"
        "    canvases.update_done()\n",
        "    canvases.update_done()\n    step = algorithm.plan(canvases)\n",
        "a forward more than needed",
        *(
            f"{SHARED}an_eos_that_leaves_nothing_to_decode_ends_the_canvas[{name}]"
            for name in BY_ENTROPY
        ),
    ),
    Mutation(
        "an EOS ends the canvas at once",
        EVERY,
        CANVASES,
        "ended = self.first_eos() < first_masked",
        "ended = self.first_eos() < self.max_answer_len",
        "answers with holes",
        (f"{SHARED}a_canvas_ends_at_its_eos_once_all_before_it_is_there",),
    ),
    Mutation(
        "an EOS ends no canvas",
        EVERY,
        CANVASES,
        '            self.done |= ended & self.flag("ends_at_eos")\n',
        "            pass\n",
        "forwards for tokens that nobody gets",
        (f"{SHARED}a_canvas_ends_at_its_eos_once_all_before_it_is_there",),
    ),
    Mutation(
        "an EOS ends every canvas",
        EVERY,
        CANVASES,
        'self.done |= ended & self.flag("ends_at_eos")',
        "self.done |= ended",
        "ignore_eos does not decode the whole canvas, if others are there",
        (f"{SHARED}a_canvas_ends_at_its_eos_once_all_before_it_is_there",),
    ),
    decoder(
        "a canvas put back goes on with its window",
        CACHED,
        "            canvas.window = (0, len(canvas))\n",
        "",
        "after a pause, a request reads keys that are another's",
        f"{DECODING}a_canvas_set_aside_goes_on_where_it_was",
    ),
    decoder(
        "all rows are counted as computed",
        CACHED,
        "canvas.tokens_computed += end - start",
        "canvas.tokens_computed += len(canvas)",
        "tokens_computed is too great",
        COUNTED,
    ),
    decoder(
        "no rows are counted as reused",
        CACHED,
        "canvas.tokens_cached += len(canvas) - (end - start)",
        "canvas.tokens_cached += 0",
        "tokens_cached is 0",
        COUNTED,
    ),
    decoder(
        "forwards without a cache are refreshes",
        EVERY,
        'is_full and options.cache != "none"',
        "is_full",
        "full_refreshes without a cache",
        COUNTED,
    ),
    decoder(
        "windows are refreshes",
        CACHED,
        "is_full = end - start == len(canvas)",
        "is_full = True",
        "full_refreshes is too great",
        COUNTED,
    ),
)
