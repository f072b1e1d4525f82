"""Breaking EntropyThreshold and FullAttnMultiBlock."""

from __future__ import annotations

from mutations.mutation import (
    BY_ENTROPY,
    EDGES,
    KERNEL,
    SELECTION,
    SHARED,
    Mutation,
    each,
    one,
)

BLOCKS = "decoding/blocks.py"
BOTH_FORCE = tuple(
    f"{EDGES}dream_forces_progress_where_nothing_is_certain[{name}]"
    for name in BY_ENTROPY
)
BOTH_STOP = tuple(
    f"{SHARED}early_stop_fills_and_the_filled_compete_once[{name}]"
    for name in BY_ENTROPY
)


def entropy(
    name: str, file: str, old: str, new: str, notice: str, *tests: str
) -> Mutation:
    return Mutation(f"entropy: {name}", BY_ENTROPY, file, old, new, notice, tests)


BY_ENTROPY_MUTATIONS = (
    entropy(
        "LLaDA's compare strict",
        "decoding/algorithms/full_attn_multi_block.py",
        "entropy <= threshold if is_llada",
        "entropy < threshold if is_llada",
        "a position at the threshold waits for another forward",
        f"{SELECTION}at_the_threshold_llada_accepts_and_dream_does_not",
    ),
    entropy(
        "Dream's compare not strict",
        "decoding/algorithms/full_attn_multi_block.py",
        "else entropy < threshold",
        "else entropy <= threshold",
        "threshold 0 is no longer one token a step",
        f"{SELECTION}at_the_threshold_llada_accepts_and_dream_does_not",
    ),
    entropy(
        "LLaDA's minimum dropped",
        "decoding/algorithms/full_attn_multi_block.py",
        "    if is_llada:\n",
        "    if is_llada and False:\n",
        "more forwards, and other tokens, where blocks overlap",
        f"{SELECTION}llada_always_takes_the_first_global_minimum",
    ),
    entropy(
        "no forced progress",
        "decoding/algorithms/full_attn_multi_block.py",
        "return accepted | first_best(-entropy, canvas_index, num_canvases, stuck)",
        "return accepted",
        "a request of Dream runs for ever",
        *BOTH_FORCE,
        f"{SELECTION}a_forced_block_moves_by_its_first_minimum_unless_it_moved",
    ),
    entropy(
        "eps 1e-8",
        "decoding/algorithms/full_attn_multi_block.py",
        "eps=1e-12",
        "eps=1e-8",
        "low thresholds accept what the published decoder does not",
        *(
            f"{EDGES}the_entropy_adds_next_to_nothing_inside_its_logarithm[{name}]"
            for name in BY_ENTROPY
        ),
    ),
    entropy(
        "another eps in every measure",
        KERNEL,
        "torch.add(p, eps)",
        "torch.add(p, 1e-8)",
        "low thresholds accept what the published decoder does not",
        *(
            f"{EDGES}the_entropy_adds_next_to_nothing_inside_its_logarithm[{name}]"
            for name in BY_ENTROPY
        ),
    ),
    entropy(
        "early stop leaves the masks' tokens",
        BLOCKS,
        "torch.where(behind, canvases.ids.gather(1, at), canvases.ids)",
        "canvases.ids",
        "the tokens before an EOS are decided without knowing the answer's end",
        *BOTH_STOP,
    ),
    entropy(
        "early stop despite ignore_eos",
        BLOCKS,
        "options.early_stop and not canvas.ignore_eos",
        "options.early_stop",
        "ignore_eos does not decode the whole canvas",
        *BOTH_STOP,
    ),
    entropy(
        "candidates taken after the fill",
        BLOCKS,
        "candidates = masked & (",
        "candidates = canvases.masked & (",
        "other tokens than the published decoder's once an EOS is there",
        *BOTH_STOP,
    ),
    entropy(
        "blocks start with the prompt",
        BLOCKS,
        "self.start + self.size[:, None], canvases",
        "self.start + (self.size - canvases.prompt_len % self.size)[:, None], canvases",
        "the blocks, and so the answer, depend on the prompt's length",
        *each("blocks_start_behind_the_prompt", BY_ENTROPY),
    ),
    one(
        "EntropyThreshold",
        "the next block joins at half",
        "decoding/algorithms/entropy_threshold.py",
        "return all_of_it, all_of_it",
        "return all_of_it / 2, all_of_it",
        "the answer is decided further ahead than published",
        f"{EDGES}a_block_is_created_at_its_threshold_or_when_the_last_one_is_done",
    ),
    one(
        "EntropyThreshold",
        "LLaDA's default on Dream",
        "decoding/algorithms/entropy_threshold.py",
        '{"threshold": 0.45}',
        "{}",
        "Dream decodes faster and worse than published",
        f"{EDGES}published_entropy_thresholds",
    ),
    one(
        "FullAttnMultiBlock",
        "LLaDA's default on Dream",
        "decoding/algorithms/full_attn_multi_block.py",
        '{"threshold": 0.4}',
        "{}",
        "Dream decodes faster and worse than published",
        f"{EDGES}published_entropy_thresholds",
    ),
    one(
        "FullAttnMultiBlock",
        "block_add_threshold strict",
        BLOCKS,
        "last_progress >= add_progress",
        "last_progress > add_progress",
        "blocks join a forward late",
        f"{EDGES}a_block_is_created_at_its_threshold_or_when_the_last_one_is_done",
    ),
    one(
        "FullAttnMultiBlock",
        "decoded_token_threshold strict",
        BLOCKS,
        "before >= activate_progress",
        "before > activate_progress",
        "with decoded_token_threshold 1 a request of Dream runs for ever",
        f"{EDGES}a_block_behind_a_finished_one_is_forced_to_move",
    ),
    one(
        "FullAttnMultiBlock",
        "a new block is active a forward late",
        BLOCKS,
        'active = state["active"] | (exists & (before',
        'active = state["active"] | (exists & (blocks.index < state["created"][:, '
        "None]) & (before",
        "Dream runs a forward that commits nothing",
        f"{EDGES}a_block_behind_a_finished_one_is_forced_to_move",
    ),
    one(
        "FullAttnMultiBlock",
        "the last active block is forced",
        BLOCKS,
        "torch.where(can_be_forced, blocks.start, far).amin(dim=1)",
        "torch.where(can_be_forced, blocks.start, -far).amax(dim=1)",
        "Dream writes ahead of what it does not know yet",
        f"{EDGES}a_block_behind_a_finished_one_is_forced_to_move",
    ),
    one(
        "FullAttnMultiBlock",
        "only active blocks are decoded",
        BLOCKS,
        "live = active | (exists & has_masks)",
        "live = active",
        "decoded_token_threshold acts as block_add_threshold",
        f"{EDGES}a_block_is_created_at_its_threshold_or_when_the_last_one_is_done",
    ),
    one(
        "FullAttnMultiBlock",
        "finished blocks are not in the span",
        BLOCKS,
        "live = active | (exists & has_masks)",
        "live = exists & has_masks",
        "with a cache, an active block is not recomputed",
        f"{SHARED}the_span_of_several_blocks",
    ),
    one(
        "FullAttnMultiBlock",
        "what an EOS filled is not in the span",
        BLOCKS,
        " | (touched & (left == 0))",
        "",
        "with a cache, masks are seen where an EOS is",
        f"{SHARED}the_span_behind_an_eos",
    ),
    one(
        "FullAttnMultiBlock",
        "the span from the answer's start",
        BLOCKS,
        "start = first_true(candidates) // blocks.size * blocks.size",
        "start = torch.zeros_like(end)",
        "with a cache, all is recomputed but once",
        f"{SHARED}the_span_of_several_blocks",
    ),
)
