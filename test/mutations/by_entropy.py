"""Breaking EntropyThreshold and FullAttnMultiBlock."""

from __future__ import annotations

from mutations.mutation import BY_ENTROPY, EDGES, SELECTION, Mutation, one

BOTH_FORCE = tuple(
    f"{EDGES}dream_forces_progress_where_nothing_is_certain[{name}]"
    for name in BY_ENTROPY
)
BOTH_STOP = tuple(
    f"{EDGES}early_stop_fills_and_the_filled_compete_once[{name}]"
    for name in BY_ENTROPY
)


def entropy(
    name: str, file: str, old: str, new: str, notice: str, *tests: str
) -> Mutation:
    return Mutation(f"entropy: {name}", BY_ENTROPY, file, old, new, notice, tests)


BY_ENTROPY_MUTATIONS = (
    entropy(
        "LLaDA's compare strict",
        "algorithms/full_attn_multi_block.py",
        "entropy <= threshold if is_llada",
        "entropy < threshold if is_llada",
        "a position at the threshold waits for another forward",
        f"{SELECTION}at_the_threshold_llada_accepts_and_dream_does_not",
    ),
    entropy(
        "Dream's compare not strict",
        "algorithms/full_attn_multi_block.py",
        "else entropy < threshold",
        "else entropy <= threshold",
        "threshold 0 is no longer one token a step",
        f"{SELECTION}at_the_threshold_llada_accepts_and_dream_does_not",
    ),
    entropy(
        "LLaDA's minimum dropped",
        "algorithms/full_attn_multi_block.py",
        "    if is_llada:\n",
        "    if is_llada and False:\n",
        "more forwards, and other tokens, where blocks overlap",
        f"{SELECTION}llada_always_takes_the_first_global_minimum",
    ),
    entropy(
        "no forced progress",
        "algorithms/full_attn_multi_block.py",
        "return accepted | first_best(-entropy, canvas_index, stuck, num_canvases)",
        "return accepted",
        "a request of Dream runs for ever",
        *BOTH_FORCE,
        f"{SELECTION}a_forced_block_moves_by_its_first_minimum_unless_it_moved",
    ),
    entropy(
        "eps 1e-8",
        "algorithms/full_attn_multi_block.py",
        "ENTROPY_EPS = 1e-12",
        "ENTROPY_EPS = 1e-8",
        "low thresholds accept what the published decoder does not",
        *(
            f"{EDGES}the_entropy_adds_next_to_nothing_inside_its_logarithm[{name}]"
            for name in BY_ENTROPY
        ),
    ),
    entropy(
        "early stop leaves the masks' tokens",
        "canvas.py",
        "self.ids[position + 1 :] = self.ids[position]",
        "self.ids[position + 1 :] = self.ids[position + 1 :]",
        "the tokens before an EOS are decided without knowing the answer's end",
        *BOTH_STOP,
    ),
    entropy(
        "early stop despite ignore_eos",
        "blocks.py",
        "self.options.early_stop and not canvas.ignore_eos",
        "self.options.early_stop",
        "ignore_eos does not decode the whole canvas",
        *BOTH_STOP,
    ),
    entropy(
        "candidates taken after the fill",
        "blocks.py",
        "masked = canvas.masked.copy()",
        "masked = canvas.masked",
        "other tokens than the published decoder's once an EOS is there",
        *BOTH_STOP,
    ),
    one(
        "EntropyThreshold",
        "the next block joins at half",
        "algorithms/entropy_threshold.py",
        "Blocks(canvas, self, options, facts, 1.0, 1.0)",
        "Blocks(canvas, self, options, facts, 0.5, 1.0)",
        "the answer is decided further ahead than published",
        f"{EDGES}a_block_is_created_at_its_threshold_or_when_the_last_one_is_done",
    ),
    one(
        "EntropyThreshold",
        "LLaDA's default on Dream",
        "algorithms/entropy_threshold.py",
        '{"threshold": 0.45}',
        "{}",
        "Dream decodes faster and worse than published",
        f"{EDGES}published_entropy_thresholds",
    ),
    one(
        "FullAttnMultiBlock",
        "LLaDA's default on Dream",
        "algorithms/full_attn_multi_block.py",
        '{"threshold": 0.4}',
        "{}",
        "Dream decodes faster and worse than published",
        f"{EDGES}published_entropy_thresholds",
    ),
    one(
        "FullAttnMultiBlock",
        "block_add_threshold strict",
        "blocks.py",
        "last.progress >= self.add_progress",
        "last.progress > self.add_progress",
        "blocks join a forward late",
        f"{EDGES}a_block_is_created_at_its_threshold_or_when_the_last_one_is_done",
    ),
    one(
        "FullAttnMultiBlock",
        "decoded_token_threshold strict",
        "blocks.py",
        "previous_progress >= self.activate_progress",
        "previous_progress > self.activate_progress",
        "with decoded_token_threshold 1 a request of Dream runs for ever",
        f"{EDGES}a_block_behind_a_finished_one_is_forced_to_move",
    ),
)
