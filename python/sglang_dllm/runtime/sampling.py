"""How the tokens of a request are drawn."""

from __future__ import annotations

import hashlib

from sglang.srt.managers.schedule_batch import Req

from sglang_dllm.decoding.canvas import SamplingOptions
from sglang_dllm.errors import RequestError


def sampling_of(req: Req, vocab_size: int) -> SamplingOptions:
    """The sampling options of a request, checked.

    Raises:
        RequestError: its seed is no 64-bit integer.
    """
    params = req.sampling_params
    seed = params.sampling_seed
    if seed is None:
        seed = _seed_of(req.rid)
    elif type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
        raise RequestError(
            f"sampling_seed={seed!r} is not allowed; expected a 64-bit integer"
        )
    return SamplingOptions(
        # SamplingParams.normalize turns temperature 0 into top_k 1.
        temperature=0.0 if params.top_k == 1 else float(params.temperature),
        top_p=float(params.top_p),
        top_k=int(params.top_k) if params.top_k < vocab_size else 0,
        min_p=float(params.min_p),
        seed=seed,
    )


def _seed_of(rid: str) -> int:
    """The seed of a request that names none: the same on every tensor-parallel rank."""
    digest = hashlib.blake2b(rid.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
