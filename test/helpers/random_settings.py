"""Random settings of every algorithm, as requests name them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_dllm.decoding.canvas import SamplingOptions

ALGORITHMS = (
    *("LLaDA", "Dream", "FastDLLM", "EntropyThreshold", "FullAttnMultiBlock"),
    *("LocalLeap", "AdaptiveParallel", "Hierarchical", "Credit", "AdaBlock"),
)
CACHED = tuple(n for n in ALGORITHMS if n not in ("Dream", "AdaptiveParallel"))
BY_ENTROPY = ("EntropyThreshold", "FullAttnMultiBlock")


@dataclass(frozen=True)
class Case:
    """One request; ``options`` is its ``dllm`` object without the algorithm.

    Attributes:
        template: the answer where a part of it is given, None for a mask.
    """

    prompt: tuple[int, ...]
    length: int
    algorithm: str
    options: dict[str, Any]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    ignore_eos: bool = False
    template: tuple[int | None, ...] | None = None

    @property
    def num_masks(self) -> int:
        return self.length if self.template is None else self.template.count(None)

    @property
    def all_options(self) -> dict[str, Any]:
        """The options, and the canvas where a part of the answer is given."""
        if self.template is None:
            return self.options
        canvas = [{"mask": 1} if x is None else {"ids": [x]} for x in self.template]
        return {**self.options, "canvas": canvas}

    def sampling_params(self) -> dict[str, Any]:
        """As /generate takes them."""
        options = {"algorithm": self.algorithm, **self.all_options}
        params: dict[str, Any] = {
            "max_new_tokens": self.length if self.template is None else None,
            "temperature": self.sampling.temperature,
            "skip_special_tokens": False,
            "ignore_eos": self.ignore_eos,
            "custom_params": {"dllm": options},
        }
        if not self.sampling.greedy:
            params["top_p"] = self.sampling.top_p
            params["top_k"] = self.sampling.top_k or -1
        return {**params, "sampling_seed": self.sampling.seed}


def random_case(
    rng: random.Random, algorithm: str, sampler_family: str, tokens: list[int]
) -> Case:
    """A request with about half of the algorithm's keys given."""
    length = rng.choice([1, 2, 5, 13, 16, 31, 32, 33, 40, 64, 65, 96])
    keys = _keys(rng, algorithm, sampler_family, length, tokens)
    options = {key: value for key, value in keys.items() if rng.random() < 0.6}
    if {"threshold", "factor"} <= options.keys():
        del options[rng.choice(["threshold", "factor"])]
    if algorithm in CACHED and not options.get("cfg_scale") and rng.random() < 0.4:
        options |= _cache(rng, algorithm)
        if algorithm == "FastDLLM" and sampler_family == "Dream":
            # Block-wise with a cache, and only then.
            options.pop("steps", None)
            options["block_size"] = rng.choice([4, 15])
    if rng.random() < 0.15:
        options["max_forwards"] = rng.choice([1, 2, 5, 20])
    sampling = SamplingOptions(seed=rng.randrange(2**40))
    # The references of the entropy rules know temperature 0 only.
    if algorithm not in BY_ENTROPY and rng.random() < 0.4:
        sampling = SamplingOptions(
            temperature=rng.choice([0.3, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]),
            seed=sampling.seed,
        )
    return Case(
        prompt=tuple(rng.choices(tokens, k=rng.choice([1, 2, 7, 19, 40]))),
        length=length,
        algorithm=algorithm,
        options=options,
        sampling=sampling,
        ignore_eos=rng.random() < 0.3,
        template=_template(rng, length, tokens) if rng.random() < 0.3 else None,
    )


def has_blocks(case: Case, sampler_family: str) -> bool:
    """True if the answer of a case may change its length."""
    if case.algorithm not in CACHED:
        return False
    if case.algorithm == "FastDLLM" and sampler_family == "Dream":
        return "cache" in case.options
    # Steps are shared out over an answer whose length is known.
    return "steps" not in case.options


def random_length(rng: random.Random) -> dict[str, Any]:
    """A length rule with about half of its keys given.

    A random model predicts few EOS and is sure of little, so the limits are low.
    """
    of_eos = {
        "initial_length": rng.choice([1, 8, 20, 40]),
        "length_step": rng.choice([1, 3, 8]),
        "eos_check_tokens": rng.choice([1, 4, 32]),
    }
    rules: dict[str, dict[str, Any]] = {
        "append": {"append_blocks": rng.choice([1, 2])},
        "rho_eos": {
            **of_eos,
            "low_density": rng.choice([0.0, 0.001, 0.4]),
            "high_density": rng.choice([0.0, 0.002, 0.6]),
            "step_schedule": rng.choice(["exp", "linear", "const"]),
        },
        "daedal": {
            **of_eos,
            "start_eos_confidence": rng.choice([0.0, 0.002]),
            "insert_confidence": rng.choice([0.02, 0.1, 0.5]),
        },
    }
    rule = rng.choice(sorted(rules))
    given = {key: value for key, value in rules[rule].items() if rng.random() < 0.7}
    return {"length": rule, **given}


def growing(rng: random.Random, case: Case) -> Case:
    """The case with a length rule, whose answer is not given in part."""
    return replace(case, template=None, options=case.options | random_length(rng))


def storm_cases(rng: random.Random, num_each: int) -> list[Case]:
    """Requests of each algorithm for a tiny LLaDA; some have gaps, some grow.

    A growing answer that finds no slots starts anew. Its tokens are then the same only
    without a cache.
    """
    cases = [
        random_case(rng, algorithm, "LLaDA", list(range(32, 120)))
        for algorithm in ALGORITHMS
        for _ in range(num_each)
    ]
    return [
        growing(rng, case)
        if has_blocks(case, "LLaDA")
        and case.template is None
        and "cache" not in case.options
        else case
        for case in cases
    ]


def _template(
    rng: random.Random, length: int, tokens: list[int]
) -> tuple[int | None, ...]:
    """Runs of masks and of text; one mask at least."""
    found: list[int | None] = []
    while len(found) < length:
        run = rng.randint(1, 40)
        found += rng.choices(tokens, k=run) if rng.random() < 0.5 else [None] * run
    found[rng.randrange(length)] = None
    return tuple(found[:length])


def _cache(rng: random.Random, algorithm: str) -> dict[str, Any]:
    kinds = ["prefix", "dual", "vicinity"]
    kind = rng.choice(kinds if algorithm == "AdaBlock" else [*kinds, "delayed"])
    keys: dict[str, dict[str, Any]] = {
        "vicinity": {
            "prefix_look": rng.choice([0, 3, 16]),
            "after_look": rng.choice([0, 5]),
            "warmup": rng.choice([0, 1, 4]),
        },
        "delayed": {
            "cache_delay_iter": rng.choice([0, 1, 2, 5]),
            "refresh_interval": rng.choice([1, 2, 3, 10_000]),
        },
    }
    given = {k: v for k, v in keys.get(kind, {}).items() if rng.random() < 0.6}
    return {"cache": kind, **given}


def _keys(
    rng: random.Random,
    algorithm: str,
    sampler_family: str,
    length: int,
    tokens: list[int],
) -> dict[str, Any]:
    share = round(rng.random(), 2)
    nats = rng.choice([0.0, 0.2, 0.5, 1.0, 2.0, 999.0])
    block = {"block_size": rng.choice([4, 8, 15, 32])}
    if algorithm == "EntropyThreshold":
        return {**block, "threshold": nats}
    if algorithm == "FullAttnMultiBlock":
        return {
            **block,
            "threshold": nats,
            "block_add_threshold": share,
            "decoded_token_threshold": rng.choice([0.5, 0.95, 1.0]),
            "early_stop": rng.random() < 0.5,
        }
    if algorithm == "LLaDA":
        return {
            **block,
            "steps": rng.randint(-(-length // 4), 2 * length + 24),
            "remasking": rng.choice(["low_confidence", "random"]),
            "cfg_scale": rng.choice([0.0, 0.5, 1.5]),
            "logits_eos_inf": rng.random() < 0.5,
            "confidence_eos_eot_inf": rng.random() < 0.5,
        }
    if algorithm == "Dream":
        return {
            "steps": rng.choice([1, 3, 8, 20, 64]),
            "alg": rng.choice(["origin", "maskgit_plus", "topk_margin", "entropy"]),
            "alg_temp": rng.choice([0.0, 0.3]),
            "eps": rng.choice([0.001, 0.1]),
        }
    if algorithm == "FastDLLM":
        own = (
            block if sampler_family == "LLaDA" else {"steps": rng.choice([1, 3, 8, 20])}
        )
        return {**own, "threshold": share, "factor": rng.choice([0.5, 1.0, 2.0])}
    if algorithm == "LocalLeap":
        return {
            **block,
            "anchor_threshold": share,
            "neighbor_threshold": round(share * 0.7, 3),
            "radius": rng.randrange(6),
        }
    if algorithm == "AdaptiveParallel":
        return {"max_parallel": rng.randint(1, 9), "threshold": share}
    if algorithm == "Hierarchical":
        return {**block, "threshold": share, "low_threshold": round(share * 0.7, 3)}
    if algorithm == "Credit":
        return {
            **block,
            "threshold": share,
            "credit_alpha": rng.choice([0.0, 0.7, 3.0]),
            "boost_gamma": rng.choice([0.2, 1.0]),
            "decay_beta": rng.choice([0.5, 0.8]),
        }
    assert algorithm == "AdaBlock", algorithm
    return {
        **block,
        "threshold": share,
        "delimiter_threshold": round(share * 0.5, 3),
        "delimiter_ids": rng.sample(tokens, 60),
    }
