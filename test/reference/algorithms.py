"""Every algorithm of docs/algorithms.md by its name, with the documented defaults."""

from __future__ import annotations

from typing import Any

from reference.canvas import GREEDY, Sampling
from reference.confidence import (
    ada_block,
    adaptive_parallel,
    credit,
    fast_dllm,
    hierarchical,
    local_leap,
)
from reference.decoding import LogitsFn, Result, first_eos, multi_block, single_block
from reference.samplers import dream, llada

_WHOLE_CANVAS = ("Dream", "AdaptiveParallel")  # they take no cache
_FAST_DLLM_BLOCK_SIZE = 32
_BY_ENTROPY = {"EntropyThreshold": single_block, "FullAttnMultiBlock": multi_block}
_OTHERS = {
    "LLaDA": llada,
    "Dream": dream,
    "FastDLLM": fast_dllm,
    "LocalLeap": local_leap,
    "AdaptiveParallel": adaptive_parallel,
    "Hierarchical": hierarchical,
    "Credit": credit,
    "AdaBlock": ada_block,
}


def _defaults(family: str) -> dict[str, dict[str, Any]]:
    """Algorithm -> options. None: no limit, or found from the answer or the model."""
    is_llada = family == "llada"
    fast_dllm_length = {"block_size": 32} if is_llada else {"steps": None}
    options: dict[str, dict[str, Any]] = {
        "EntropyThreshold": {
            "block_size": 32,
            "threshold": 0.5 if is_llada else 0.45,
            "early_stop": False,
        },
        "FullAttnMultiBlock": {
            "block_size": 32,
            "threshold": 0.5 if is_llada else 0.4,
            "block_add_threshold": 0.1,
            "decoded_token_threshold": 0.95,
            "early_stop": is_llada,
        },
        "LLaDA": {
            "block_size": 32,
            "steps": None,  # one a token
            "remasking": "low_confidence",
            "cfg_scale": 0.0,
            "logits_eos_inf": False,
            "confidence_eos_eot_inf": False,
        },
        "Dream": {
            "steps": None,  # one a token
            "alg": "entropy",
            "alg_temp": 0.0,
            "eps": 0.001,
        },
        # steps: one per 32 tokens
        "FastDLLM": {"threshold": 0.9, "factor": None, **fast_dllm_length},
        "LocalLeap": {
            "block_size": 32,
            "anchor_threshold": 0.9,
            "neighbor_threshold": 0.75,
            "radius": 4,
        },
        "AdaptiveParallel": {"max_parallel": 8, "threshold": 0.3},
        "Hierarchical": {"block_size": 64, "threshold": 0.92, "low_threshold": 0.62},
        "Credit": {
            "block_size": 32,
            "threshold": 0.9,
            "credit_alpha": 0.7,
            "boost_gamma": 0.2,
            "decay_beta": 0.8,
        },
        "AdaBlock": {
            "block_size": 32,
            "threshold": 0.9,
            "delimiter_threshold": 0.3 if is_llada else 0.5,
            "delimiter_ids": None,  # the newline tokens, told by the caller
        },
    }
    # The keys of `reference.cache`.
    cache = {"cache": "none", "prefix_look": 16, "after_look": 16, "warmup": 4}
    delayed = {
        "cache_delay_iter": 2 if is_llada else 1,
        "refresh_interval": 3 if is_llada else 10_000,
    }
    for name, keys in options.items():
        keys["max_forwards"] = None
        if name not in _WHOLE_CANVAS:
            keys |= cache
            # AdaBlock's blocks are not there before they are decoded.
            keys |= delayed if name != "AdaBlock" else {}
    return options


DEFAULTS = {family: _defaults(family) for family in ("llada", "dream")}
CACHE_KEYS = (
    "cache", "prefix_look", "after_look", "warmup", "cache_delay_iter",
    "refresh_interval",
)  # fmt: skip


def run(
    algorithm: str,
    model: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    options: dict[str, Any],
    sampling: Sampling = GREEDY,
    *,
    unconditional: LogitsFn | None = None,
    **facts: Any,
) -> Result:
    """Decode the whole answer by the algorithm of that name.

    Args:
        model: a `LogitsFn`, see `reference.decoding`; with a cache it also has a
            `new_memory`, see `reference.memory`.
        options: keys of docs/algorithms.md; the missing ones get the defaults.
        unconditional: for LLaDA's guidance, see `reference.samplers.llada`.
        facts: family, mask_id, eos_id, eot_token_id, delimiter_ids; what is not given
            is read from the model object. A `template` gives a part of the answer.
    """
    family = facts.get("family") or model.family
    defaults = DEFAULTS[family][algorithm]
    cache = options.get("cache", "none")
    if algorithm == "FastDLLM" and cache != "none":
        # Dream's is block-wise with a cache only.
        defaults = {"block_size": _FAST_DLLM_BLOCK_SIZE, **defaults}
    if unknown := options.keys() - defaults.keys():
        raise ValueError(f"{algorithm} on {family} has no {sorted(unknown)}")
    options = defaults | options
    if cache != "none" and options.get("cfg_scale", 0) > 0:
        raise ValueError("guidance takes no cache")
    if cache == "delayed" and algorithm == "AdaBlock":
        raise ValueError("AdaBlock has no blocks that could be cached with a delay")
    if algorithm in _BY_ENTROPY:
        if sampling.temperature != 0:
            raise ValueError(f"{algorithm}: the reference knows temperature 0 only")
        keys = ("family", "mask_id", "eos_id", "template", "part", "edits")
        needed = {k: facts[k] for k in keys if k in facts}
        decode = _BY_ENTROPY[algorithm]
        needed["cache"] = {key: options.pop(key) for key in CACHE_KEYS}
        return decode(model, prompt_ids, max_new_tokens, **options, **needed)
    if algorithm == "LLaDA":
        facts["unconditional"] = unconditional
    decode = _OTHERS[algorithm]
    return decode(
        model, prompt_ids, max_new_tokens, options=options, sampling=sampling, **facts
    )


def nfe_at_visible(result: Result, eos_id: int) -> int:
    """Forwards a server runs that ends once the visible answer is committed.

    That is when the first EOS and all before it are. Nothing can move the first EOS
    later: the positions before it are all committed by then.
    """
    eos_at = first_eos(result.ids, eos_id, result.ends_from)
    if eos_at is None:
        return result.nfe
    # No forward writes a given id.
    behind = range(result.ends_from, eos_at + 1)
    if any(result.commit_order[i] is None for i in behind):
        raise AssertionError("only ids behind an EOS are filled in by no forward")
    return 1 + max(by for by in result.commit_order[: eos_at + 1] if by is not None)
