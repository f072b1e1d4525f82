"""Breaking what the algorithms share: ranks, the shift, the mask, the last step."""

from __future__ import annotations

from mutations.mutation import (
    BY_CONFIDENCE,
    BY_ENTROPY,
    DECODING,
    EDGES,
    EVERY,
    RANKED,
    SHARED,
    Mutation,
    each,
    without,
)

SHARED_MUTATIONS = (
    Mutation(
        "ranks: ties to the last",
        RANKED,
        "selection.py",
        "best_first = value.sort(descending=True, stable=True).indices",
        "best_first = value.sort(stable=True).indices.flip(0)",
        "equally sure positions are written from the end: another answer",
        each("equal_positions_go_lower_first", RANKED),
    ),
    Mutation(
        "first_best: ties to the last",
        (*BY_ENTROPY, "AdaBlock"),
        "selection.py",
        'torch.where(is_best, index, len(value)), "amin")',
        'torch.where(is_best, index, -1), "amax", include_self=False)',
        "of equally certain positions (delimiters) the last one counts",
        (
            *each("equal_positions_go_lower_first", BY_ENTROPY),
            f"{EDGES}ada_block_ends_at_the_best_delimiter_in_its_window",
        ),
    ),
    Mutation(
        "x0: ties to the last",
        EVERY,
        "prediction.py",
        "without_token(chunk, judged.facts.mask_id).argmax(dim=-1)",
        "vocab_size - 1 - "
        "without_token(chunk, judged.facts.mask_id).flip(1).argmax(dim=-1)",
        "of equally likely tokens the greatest id is written",
        each("equal_tokens_go_to_the_lower_id", EVERY),
    ),
    Mutation(
        "shift dropped",
        EVERY,
        "step.py",
        "planned(state).candidates - shift, 0)",
        "planned(state).candidates, 0)",
        "Dream writes each position's successor: gibberish",
        each("dream_reads_the_row_before", EVERY),
    ),
    Mutation(
        "shift leaves the canvas",
        EVERY,
        "step.py",
        "np.maximum(planned(state).candidates - shift, 0)",
        "(planned(state).candidates - shift)",
        "with an empty prompt Dream's first token comes from the last row",
        each("dream_reads_row_0_for_the_first_position", EVERY),
    ),
    Mutation(
        "mask token allowed as argmax",
        EVERY,
        "prediction.py",
        "without_token(chunk, judged.facts.mask_id).argmax",
        "chunk.argmax",
        "mask tokens in the answer",
        each("the_mask_token_is_never_predicted", EVERY),
    ),
    Mutation(
        "mask token allowed in draws",
        without(*BY_ENTROPY),
        "sampling.py",
        "scaled = without_token(logits.double(), mask_id) / temperature",
        "scaled = logits.double() / temperature",
        "mask tokens in the answer at temperatures above 0",
        (f"{DECODING}draws_follow_temperature_top_k_and_top_p",),
    ),
    Mutation(
        "confidence without the mask token",
        BY_CONFIDENCE,
        "prediction.py",
        "value[rows] = statistic(chunk.double().softmax(dim=-1), tokens[rows])",
        "value[rows] = statistic(without_token(chunk.double(), "
        "judged.facts.mask_id).softmax(dim=-1), tokens[rows])",
        "positions that would stay masked pass their threshold",
        (f"{DECODING}the_mask_token_is_never_predicted_and_the_measures_count_it",),
    ),
    Mutation(
        "confidence of a draw by the other family",
        BY_CONFIDENCE,
        "prediction.py",
        'of_drawn=judged.facts.family.lineage == "Dream"',
        'of_drawn=judged.facts.family.lineage != "Dream"',
        "at a temperature, LLaDA writes far too many tokens a step, Dream too few",
        tuple(
            f"{SHARED}the_confidence_of_a_draw_is_the_familys[{name}-options{index}]"
            for index, name in enumerate(BY_CONFIDENCE)
        ),
    ),
    Mutation(
        "max_forwards: one more",
        EVERY,
        "algorithm.py",
        "self.canvas.num_forwards + 1 >= most",
        "self.canvas.num_forwards + 1 > most",
        "a request that paid for n forwards runs n + 1",
        each("the_last_of_max_forwards_commits_all_that_is_left", EVERY),
    ),
    Mutation(
        "max_forwards: the last step sees its block only",
        without("Dream", "AdaptiveParallel"),
        "algorithm.py",
        "step = replace(step, candidates=masks)",
        "step = replace(step)",
        "a request goes on, a block a forward, behind its max_forwards",
        each(
            "the_last_of_max_forwards_commits_all_that_is_left",
            without("Dream", "AdaptiveParallel"),
        ),
    ),
    Mutation(
        "one random number for token and order",
        ("LLaDA", "Dream"),
        "sampling.py",
        "position + (stream << 32)",
        "position",
        "a position's token decides when it is written: biased samples",
        (f"{DECODING}counter_uniform_is_uniform_and_keyed_by_all_its_arguments",),
    ),
    Mutation(
        "seed left out",
        without(*BY_ENTROPY),
        "sampling.py",
        "state = _mix(seed)",
        "state = _mix(seed * 0)",
        "a seed changes nothing",
        (
            f"{DECODING}sampling_repeats_with_its_seed_alone_and_in_a_crowd",
            f"{DECODING}a_random_order_comes_from_the_seed[LLaDA-options0]",
            f"{DECODING}a_random_order_comes_from_the_seed[Dream-options1]",
        ),
    ),
    Mutation(
        "shares: one part too many gets one more",
        ("LLaDA", "FastDLLM"),
        "blockwise.py",
        "(index < total % parts)",
        "(index <= total % parts)",
        "a step too few: fewer forwards, worse answers",
        (f"{EDGES}llada_schedule", f"{EDGES}fast_dllm_shares_on_dream"),
    ),
    Mutation(
        "blocks start with the prompt",
        without("Dream", "AdaptiveParallel", *BY_ENTROPY),
        "blockwise.py",
        "self.end = min(self.start + self.options.block_size, len(self.canvas))",
        "self.end = min(self.start - self.start % self.options.block_size"
        " + self.options.block_size, len(self.canvas))",
        "the blocks, and so the answer, depend on the prompt's length",
        each(
            "blocks_start_behind_the_prompt",
            without("Dream", "AdaptiveParallel", *BY_ENTROPY),
        ),
    ),
)
