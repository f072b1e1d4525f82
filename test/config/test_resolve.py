"""Resolved options can be resolved again: the server checks a request in two places."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from helpers.random_settings import random_case
from sglang_dllm.config.resolve import request_options
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.decoding.registry import OURS, algorithms
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.models.facts import FAMILIES, ModelFacts

NAMES = [kind.__name__ for kind in OURS]
FACTS = {
    name: ModelFacts(family, 9, (5,), 1000, newline_ids=(13, 14))
    for name, family in FAMILIES.items()
}
YAML: dict[str, dict[str, Any]] = {
    "none": {},
    "some": {
        "algorithms": {
            "FastDLLM": {"factor": 1.5},
            "LLaDA": {"block_size": 16, "cfg_scale": 0.5},
            "FullAttnMultiBlock": {"cache": "delayed", "threshold": 0.7},
            "AdaBlock": {"cache": "vicinity", "warmup": 0, "delimiter_ids": []},
        }
    },
}


def resolved(decode: Any, facts: ModelFacts, request: Any, length: int) -> Decoding:
    found: Decoding = decode.resolve(request).finalized(length, facts)
    return found


@pytest.mark.parametrize("yaml", YAML)
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_resolved_options_resolve_to_themselves(
    name: str, architecture: str, yaml: str
) -> None:
    """With every cache, through JSON, and by a server with another default."""
    facts = FACTS[architecture]
    rng = random.Random(f"{name} {architecture} {yaml}")
    decode = parse_decode_config("LocalLeap", facts.family, YAML[yaml])
    requests: list[tuple[dict[str, Any], int]] = [
        ({"algorithm": name, "cache": cache, "cfg_scale": 0.0}, 48)
        if name == "LLaDA"
        else ({"algorithm": name, "cache": cache}, 48)
        for cache in algorithms()[name].caches
    ]
    for _ in range(40):
        family = facts.family.sampler_family
        case = random_case(rng, name, family, list(range(20, 90)))
        requests.append(({"algorithm": name, **case.options}, case.length))
    num_resolved = 0
    for request, length in requests:
        try:
            first = resolved(decode, facts, request, length)
        except ValueError:
            continue  # an option of the file and one of the request exclude each other
        num_resolved += 1
        sent = json.loads(json.dumps({"dllm": first.to_dict()}))
        second = resolved(decode, facts, request_options(sent), length)
        assert second == first
        assert second.to_dict() == first.to_dict()
    assert num_resolved > len(requests) // 2
