"""The list of algorithms says of each option what the option classes say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_dllm.config.catalogue import catalogue
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.lengths.registry import LENGTHS
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import FAMILIES, Family

ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def found_of(family: Family, **given: Any) -> dict[str, Any]:
    decode = parse_decode_config("FullAttnMultiBlock", family, given)
    found: dict[str, Any] = json.loads(json.dumps(catalogue(decode)))
    return found


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in entries}


@ALL_FAMILIES
def test_all_of_them_are_there(family: Family) -> None:
    found = found_of(family)
    assert [one["name"] for one in found["algorithms"]] == list(algorithms())
    assert [one["name"] for one in found["caches"]] == list(CACHES)
    assert [one["name"] for one in found["lengths"]] == list(LENGTHS)
    for one in (*found["algorithms"], *found["caches"], *found["lengths"]):
        assert one["description"].endswith("."), one["name"]


@ALL_FAMILIES
def test_each_range_is_the_one_that_requests_are_checked_with(family: Family) -> None:
    decode = parse_decode_config("FullAttnMultiBlock", family, {})
    for one in found_of(family)["algorithms"]:
        for option in one["options"]:
            key = {"algorithm": one["name"]}
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if bound not in option:
                    continue
                decode.resolve({**key, option["name"]: option[bound]})
                with pytest.raises(OptionError, match=option["name"]):
                    decode.resolve({**key, option["name"]: option[bound] + step})
            for value in option.get("enum", ()):
                decode.resolve({**key, option["name"]: value})
            assert option["description"]


def test_defaults_are_the_family_s_and_the_server_s() -> None:
    llada, dream = FAMILIES["LLaDAModelLM"], FAMILIES["DreamModel"]

    def threshold(found: dict[str, Any]) -> Any:
        options = by_name(found["algorithms"])["FullAttnMultiBlock"]["options"]
        return by_name(options)["threshold"]["default"]

    assert threshold(found_of(llada)) == 0.5
    assert threshold(found_of(dream)) == 0.4
    assert threshold(found_of(llada, threshold=0.3)) == 0.3
    cached = found_of(llada, cache="dual", length="append")
    entry = by_name(cached["algorithms"])["FullAttnMultiBlock"]
    assert (entry["cache"], entry["length"]) == ("dual", "append")


def test_types_and_exclusions() -> None:
    found = by_name(found_of(FAMILIES["LLaDAModelLM"])["algorithms"])
    fast = found["FastDLLM"]
    assert fast["exclude"] == ["threshold", "factor"]
    options = by_name(fast["options"])
    assert options["factor"]["type"] == "number" and options["factor"]["nullable"]
    assert options["max_forwards"]["type"] == "integer"
    assert by_name(found["LLaDA"]["options"])["remasking"]["enum"] == [
        "low_confidence",
        "random",
    ]
    assert by_name(found["AdaBlock"]["options"])["delimiter_ids"]["type"] == "array"
