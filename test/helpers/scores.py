"""The answer that a plain reference gives to ``dllm.score``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from reference import likelihood
from reference.memory import LogitsFn
from sglang_dllm.decoding.sampling import Stream, counter_uniform

_STREAMS = {"count": Stream.COUNT, "mask": Stream.MASK}


def uniform_of(seed: int) -> Callable[[str, int, int], float]:
    """The random numbers of a seed, for the reference."""

    def uniform(stream: str, step: int, position: int) -> float:
        seeds, steps, positions = torch.tensor([[seed], [step], [position]])
        return float(counter_uniform(seeds, steps, positions, _STREAMS[stream]))

    return uniform


def expected_score(
    model: LogitsFn,
    prompt: list[int],
    target: list[int],
    mask_id: int,
    score: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Some of the keys of the answer.

    Args:
        score: the method and its options.
    """
    common = (model, prompt, target, mask_id)
    cfg_scale, method = score.get("cfg_scale", 0.0), score["method"]
    if method == "greedy":
        return {"is_greedy": likelihood.is_greedy(*common, cfg_scale=cfg_scale)}
    if method == "mc":
        total = likelihood.mc(
            *common,
            num_samples=score["num_samples"],
            batch_size=score.get("batch_size", 16),
            uniform=uniform_of(seed),
            cfg_scale=cfg_scale,
        )
        return {"log_likelihood": total}
    tokens = getattr(likelihood, method)(*common, cfg_scale=cfg_scale)
    return {"log_likelihood": sum(tokens), "token_log_likelihoods": tokens}
