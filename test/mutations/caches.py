"""Breaking the caches: where a window starts and ends, and when all is recomputed."""

from __future__ import annotations

from mutations.mutation import CACHE, CONFIG, SHARED, Mutation, without

CACHED = without("Dream", "AdaptiveParallel")
BY_BLOCKS = without("Dream", "AdaptiveParallel", "AdaBlock")
WINDOWS = f"{SHARED}windows_of_a_cache"
IN_ONE_BATCH = f"{SHARED}windows_of_caches_in_one_batch"
WALK = f"{SHARED}on_llada_a_block_starts_to_wait_behind_the_one_before"
SLOW = "more is recomputed than published: slower"
STALE = "tokens are decided over keys and values that are too old: worse answers"
IN_A_CROWD = "an answer depends on who else is in the batch"


def cases(*which: int) -> tuple[str, ...]:
    """Of the windows' test, by their place in its table, on both families."""
    return tuple(
        f"{WINDOWS}[{index}-{family}]"
        for index in which
        for family in ("llada", "dream")
    )


PREFIX, PREFIX_ENDS, DUAL = 0, 1, 2
LOOKS, WARM, LOOKS_AHEAD = 4, 5, 6
NO_DELAY, NO_DELAY_ENDS, REFRESHED, DELAYED = 7, 8, 9, 10


def cache(name: str, old: str, new: str, notice: str, *tests: str) -> Mutation:
    return Mutation(f"cache: {name}", CACHED, CACHE, old, new, notice, tests)


def delayed(name: str, old: str, new: str, notice: str, *tests: str) -> Mutation:
    return Mutation(f"delayed: {name}", BY_BLOCKS, CACHE, old, new, notice, tests)


CACHE_MUTATIONS = (
    cache(
        "the span without the prompt",
        "start, end = canvases.prompt_len + step.start, canvases.prompt_len + step.end",
        "start, end = step.start, step.end",
        "the block is not recomputed: gibberish",
        *cases(PREFIX),
    ),
    cache(
        "no full forward at a new block",
        "is_full = step.start != refreshed_at",
        "is_full = refreshed_at < 0",
        STALE,
        *cases(PREFIX, DUAL, LOOKS),
    ),
    cache(
        "the last full forward is forgotten",
        "torch.where(is_full, step.start, refreshed_at)",
        "refreshed_at",
        SLOW,
        *cases(PREFIX, DUAL, LOOKS),
    ),
    cache(
        "the last of max_forwards is a window",
        "is_full = is_full | last",
        "is_full = is_full",
        "masks outside the window get the tokens of another forward",
        *cases(PREFIX_ENDS, NO_DELAY_ENDS),
    ),
    cache(
        "no row before the window",
        "(window_start - canvases.facts.family.shift)",
        "window_start",
        "Dream's first token of a block is an old one",
        *(f"{WINDOWS}[{index}-dream]" for index in (PREFIX, DUAL, NO_DELAY)),
    ),
    cache(
        "a row before the window for all",
        "(window_start - canvases.facts.family.shift)",
        "(window_start - 1)",
        SLOW,
        *(f"{WINDOWS}[{index}-llada]" for index in (PREFIX, DUAL, NO_DELAY)),
    ),
    cache(
        "windows start before the canvas",
        "canvases.facts.family.shift).clamp(min=0)",
        "canvases.facts.family.shift)",
        "a request fails",
        f"{WINDOWS}[{LOOKS_AHEAD}-dream]",
    ),
    cache(
        "windows end behind the canvas",
        "torch.minimum(window_end, whole_end)",
        "window_end",
        "a request fails",
        *cases(LOOKS),
    ),
    cache(
        "dual recomputes what is behind",
        "end, window_end)\n    if",
        "window_end, window_end)\n    if",
        SLOW,
        *cases(DUAL),
    ),
    cache(
        "dual's end for all",
        'torch.where(canvases.option_is("cache", "dual"), end, window_end)',
        "end",
        IN_A_CROWD,
        IN_ONE_BATCH,
    ),
    cache(
        "vicinity's looks for all",
        'uses = canvases.option_is("cache", "vicinity")',
        "uses = torch.ones_like(canvases.done)",
        IN_A_CROWD,
        IN_ONE_BATCH,
    ),
    cache(
        "delayed for all",
        'uses = canvases.option_is("cache", "delayed")',
        "uses = torch.ones_like(canvases.done)",
        IN_A_CROWD,
        IN_ONE_BATCH,
    ),
    cache(
        "a cache for those without",
        '    is_full = is_full | canvases.option_is("cache", "none")\n',
        "",
        IN_A_CROWD,
        IN_ONE_BATCH,
    ),
    cache(
        "vicinity looks at nothing before",
        'before = start - canvases.option("prefix_look", torch.int64)',
        "before = start",
        "prefix_look changes nothing",
        *cases(LOOKS, WARM, LOOKS_AHEAD),
    ),
    cache(
        "vicinity looks at nothing behind",
        'behind = end + canvases.option("after_look", torch.int64)',
        "behind = end",
        "after_look changes nothing",
        *cases(LOOKS),
    ),
    cache(
        "vicinity looks behind from the start",
        'behind = end + canvases.option("after_look", torch.int64)',
        'behind = start + canvases.option("after_look", torch.int64)',
        STALE,
        *cases(LOOKS),
    ),
    cache(
        "warmup off by one",
        "(canvases.num_forwards < warmup)",
        "(canvases.num_forwards <= warmup)",
        SLOW,
        *cases(LOOKS, WARM),
    ),
    cache(
        "warmup ignored",
        "is_full = is_full | (uses & (canvases.num_forwards < warmup))",
        "is_full = is_full | (uses & (canvases.num_forwards < 0))",
        STALE,
        *cases(WARM),
    ),
    delayed(
        "the other family's defaults",
        'if family.sampler_family == "Dream":',
        'if family.sampler_family == "LLaDA":',
        "other windows than published",
        f"{CONFIG}caches_have_published_defaults_and_need_naming",
    ),
    delayed(
        "a block joins late",
        "(waited >= delay)",
        "(waited > delay)",
        SLOW,
        *cases(NO_DELAY, DELAYED),
    ),
    delayed(
        "forwards counted from 0",
        "now = (canvases.num_forwards + 1)[:, None]",
        "now = canvases.num_forwards[:, None]",
        "refreshes a forward late, and the prompt joins a forward late",
        *cases(REFRESHED, DELAYED),
    ),
    delayed(
        "refreshes count from 0",
        "(now[:, 0] % interval == 0)",
        "((now[:, 0] - 1) % interval == 0)",
        "refreshes a forward late",
        *cases(REFRESHED),
    ),
    delayed(
        "no refresh",
        " | (now[:, 0] % interval == 0)",
        "",
        "refresh_interval changes nothing",
        *cases(REFRESHED),
    ),
    delayed(
        "a refresh though a block joins",
        "(~joins.any(dim=1) & refreshes)",
        "refreshes",
        SLOW,
        *cases(REFRESHED),
        f"{WALK}[dream-want1]",
    ),
    delayed(
        "no full forwards while a block waits",
        "refreshes = waits.any(dim=1) | (now",
        "refreshes = (now",
        "a finished block's keys do not know their own tokens",
        *cases(DELAYED),
    ),
    delayed(
        "a block waits from the start",
        "waited = torch.where(done_at < 0, 0, now - done_at)",
        "waited = now - done_at",
        "a finished block's keys do not know their own tokens",
        *cases(DELAYED),
    ),
    delayed(
        "a block's time starts again",
        "done_at = torch.where(is_reached & (done_at < 0), now, done_at)",
        "done_at = torch.where(is_reached, now, done_at)",
        "nothing is ever cached",
        f"{WALK}[llada-want0]",
        f"{WALK}[dream-want1]",
    ),
    delayed(
        "the prompt is finished at the first forward",
        "    done_at[:, 0] = 0\n",
        "",
        "the prompt joins a forward late",
        *cases(DELAYED),
    ),
    delayed(
        "the window without what joins",
        "    return start, (start == 0)",
        '    return cache["cached"], (start == 0)',
        "a joined block's keys are those of a forward too early",
        *cases(NO_DELAY, DELAYED),
    ),
    delayed(
        "a joined block joins for ever",
        "joins = is_reached & is_due & ~cache",
        "joins = is_reached & is_due | cache",
        SLOW,
        *cases(REFRESHED, DELAYED),
    ),
    delayed(
        "blocks begin with the prompt",
        "canvases.answer_len[:, None]) + prompt",
        "canvases.answer_len[:, None] + prompt)",
        "masks are cached: gibberish",
        *cases(NO_DELAY, DELAYED),
    ),
    delayed(
        "of two blocks the first joins",
        "joined = torch.where(joins, ends, 0).amax(dim=1)",
        "joined = torch.where(joins, ends, 1 << 40).amin(dim=1) % (1 << 40)",
        SLOW,
        f"{SHARED}blocks_that_become_finished_at_once_join_at_once",
    ),
    delayed(
        "Dream's walk on LLaDA",
        'if canvases.facts.family.sampler_family == "LLaDA":',
        "if False:",
        "blocks join earlier than published",
        f"{WALK}[llada-want0]",
    ),
    delayed(
        "LLaDA's walk on Dream",
        'if canvases.facts.family.sampler_family == "LLaDA":',
        "if True:",
        "blocks join later than published",
        f"{WALK}[dream-want1]",
    ),
    delayed(
        "LLaDA's walk does not see the block that is not due",
        "goes_on = torch.nn.functional.pad(is_due[:, :-1], (1, 0), value=True)",
        "goes_on = is_due",
        "a block's time never starts: nothing is ever cached",
        f"{WINDOWS}[{DELAYED}-llada]",
    ),
)
