"""Decoding configuration: published defaults, ranges, one-line errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reference.algorithms import DEFAULTS
from sglang_dllm.config.resolve import DecodeConfig, request_options
from sglang_dllm.config.server import load_decode_config, parse_decode_config
from sglang_dllm.decoding.caches.registry import READERS
from sglang_dllm.decoding.registry import OURS, algorithms
from sglang_dllm.errors import ConfigError, OptionError
from sglang_dllm.models.facts import FAMILIES, Family, ModelFacts

LLADA, DREAM = FAMILIES["LLaDAModelLM"], FAMILIES["DreamModel"]


def resolved(config: DecodeConfig, answer_len: int = 64, **request: Any) -> dict:
    facts = ModelFacts(
        config.family, mask_id=9, eos_ids=(5,), vocab_size=100, newline_ids=(7,)
    )
    return config.resolve(request).finalized(answer_len, facts).to_dict()


def test_defaults_are_the_published_ones() -> None:
    llada = parse_decode_config("FullAttnMultiBlock", LLADA, {})
    dream = parse_decode_config("FullAttnMultiBlock", DREAM, {})
    assert resolved(llada) == {
        "algorithm": "FullAttnMultiBlock",
        "cache": "none",
        "length": "fixed",
        "max_forwards": None,
        "block_size": 32,
        "threshold": 0.5,
        "block_add_threshold": 0.1,
        "decoded_token_threshold": 0.95,
        "early_stop": True,
    }
    assert resolved(dream)["threshold"] == 0.4
    assert resolved(dream)["early_stop"] is False
    assert resolved(dream, algorithm="EntropyThreshold")["threshold"] == 0.45
    assert resolved(dream, algorithm="AdaBlock")["delimiter_threshold"] == 0.5
    assert resolved(llada, algorithm="AdaBlock")["delimiter_threshold"] == 0.3


@pytest.mark.parametrize("family", [LLADA, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize("name", [kind.__name__ for kind in OURS])
def test_defaults_are_those_of_the_references(name: str, family: Family) -> None:
    theirs = DEFAULTS[family.sampler_family.lower()][name]
    filled = {"steps", "delimiter_ids", "cache"}
    for cache in algorithms()[name].caches:
        ours = resolved(parse_decode_config(name, family, {"cache": cache}))
        assert ours["cache"] == cache
        for key, value in theirs.items():
            needs = READERS.get(key, cache)
            assert key in filled or needs != cache or ours[key] == value, key


def test_the_request_wins_over_the_yaml_and_the_yaml_over_the_published() -> None:
    config = parse_decode_config(
        "FullAttnMultiBlock",
        LLADA,
        {"threshold": 0.3, "algorithms": {"FastDLLM": {"threshold": 0.8}}},
    )
    assert resolved(config)["threshold"] == 0.3
    assert resolved(config, threshold=0.2)["threshold"] == 0.2
    fast = resolved(config, algorithm="FastDLLM")
    assert (fast["threshold"], fast["factor"]) == (0.8, None)
    assert resolved(config, algorithm="LocalLeap")["radius"] == 4


def test_a_factor_replaces_the_default_threshold() -> None:
    config = parse_decode_config("FastDLLM", LLADA, {"threshold": 0.8})
    found = resolved(config, factor=1.0)
    assert (found["threshold"], found["factor"]) == (None, 1.0)
    with pytest.raises(OptionError, match="threshold and factor"):
        resolved(config, factor=1.0, threshold=0.5)


def test_options_that_depend_on_the_answer_are_filled_in() -> None:
    llada = parse_decode_config("LLaDA", LLADA, {})
    assert resolved(llada, 50)["steps"] == 50
    with pytest.raises(OptionError, match=r"steps=1 .*each of the 2 blocks"):
        resolved(llada, 50, steps=1)
    dream = parse_decode_config("Dream", DREAM, {})
    assert resolved(dream, 50)["steps"] == 50
    assert resolved(dream, 65, algorithm="FastDLLM")["steps"] == 3


def test_null_is_a_key_left_out() -> None:
    assert request_options({"dllm": {"radius": None, "steps": 3}}) == {"steps": 3}
    assert request_options({"dllm": None}) == request_options(None) == {}


@pytest.mark.parametrize(
    ("request_", "key", "expected"),
    [
        ({"algorithm": "Nope"}, "algorithm", "FastDLLM"),
        ({"algorithm": 3}, "algorithm", "FastDLLM"),
        ({"radius": 3}, "radius", "FullAttnMultiBlock uses"),
        ({"algorithm": "FastDLLM", "steps": 3}, "steps", "on this model: "),
        ({"algorithm": "LLaDA", "remasking": "low"}, "remasking", "low_confidence"),
        ({"algorithm": "LLaDA", "cfg_scale": -1}, "cfg_scale", "0 to 100"),
        ({"algorithm": "AdaBlock", "delimiter_ids": [-1]}, "delimiter_ids", "list of"),
        ({"max_forwards": 0}, "max_forwards", "1 to 100000"),
        ({"threshold": float("nan")}, "threshold", "nats"),
        ({"cache": "sometimes"}, "cache", "none, prefix, dual, delayed or vicinity"),
        ({"cache": {}}, "cache", "none, prefix, dual, delayed or vicinity"),
        ({"algorithm": "Dream", "cache": "dual"}, "cache", "with Dream: none"),
        ({"algorithm": "AdaBlock", "cache": "delayed"}, "cache", "none, prefix, dual"),
        (
            {"algorithm": "LLaDA", "cache": "dual", "cfg_scale": 1.0},
            "cache",
            "guidance",
        ),
        ({"warmup": 3}, "warmup", "nothing, unless cache is vicinity"),
        ({"cache": "dual", "prefix_look": 3}, "prefix_look", "cache is vicinity"),
        ({"cache": "delayed", "refresh_interval": 0}, "refresh_interval", "1 to"),
        ({"cache": "vicinity", "after_look": 5000}, "after_look", "0 to 4096"),
    ],
)
def test_a_wrong_request_is_named(request_: dict, key: str, expected: str) -> None:
    config = parse_decode_config("FullAttnMultiBlock", LLADA, {})
    with pytest.raises(OptionError) as error:
        config.resolve(request_)
    assert error.value.key == key
    assert expected in error.value.expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", 0),
        ("block_size", 4097),
        ("block_size", 1.5),
        ("block_size", "32"),
        ("block_size", True),
        ("threshold", -0.1),
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("threshold", "low"),
        ("block_add_threshold", 1.1),
        ("decoded_token_threshold", -1),
        ("decoded_token_threshold", [0.5]),
        ("early_stop", 1),
        ("early_stop", "yes"),
        ("cache_delay_iter", 2),
        ("refresh_interval", 3),
        ("warmup", 1),
        ("cache", "sometimes"),
        ("cache", ["dual"]),
        ("steps_per_round", 0),
        ("steps_per_round", 1.5),
        ("steps_per_round", True),
        ("prelaunch", 1),
        ("prelaunch", "auto"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_decode_config("FullAttnMultiBlock", LLADA, {key: value})
    message = str(error.value)
    assert key in message and repr(value) in message and "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [True, False, None, "auto"])
def test_the_old_name_of_prelaunch_ends_the_launch(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_decode_config("FullAttnMultiBlock", LLADA, {"overlap": value})
    assert str(error.value) == (
        "--dllm-algorithm-config: overlap is now called prelaunch"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"steps_per_round": None},
            "steps_per_round=None is not allowed; expected an integer, 1 to 1000",
        ),
        ({"prelaunch": 1}, "prelaunch=1 is not allowed; expected true or false"),
        (
            {"algorithms": None},
            "algorithms=None is not allowed; "
            "expected a mapping of algorithms to their options",
        ),
        (
            {"algorithm": "FastDLLM"},
            "algorithm='FastDLLM' is not allowed; "
            "expected the algorithm's options: --dllm-algorithm names it",
        ),
        (
            {"threshold": 1.0, "algorithms": {"FullAttnMultiBlock": {}}},
            "options of FullAttnMultiBlock stand both at the top and under "
            "algorithms; expected one of the two",
        ),
    ],
)
def test_the_texts_of_a_wrong_file(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_decode_config("FullAttnMultiBlock", LLADA, options)
    assert str(error.value) == f"--dllm-algorithm-config: {message}"


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"steps=8 .*: cache, length, max_for"):
        parse_decode_config("FullAttnMultiBlock", LLADA, {"steps": 8})


def test_caches_have_published_defaults_and_need_naming() -> None:
    config = parse_decode_config(
        "FullAttnMultiBlock",
        DREAM,
        {
            **{"steps_per_round": 2, "prelaunch": True},
            **{"cache_delay_iter": 10_000, "refresh_interval": 10_000},
        },
    )
    assert config.steps_per_round == 2 and config.prelaunch is True
    assert resolved(config)["cache"] == "none"
    delayed = resolved(config, cache="delayed")
    assert (delayed["cache_delay_iter"], delayed["refresh_interval"]) == (1, 10_000)
    assert not {"prefix_look", "warmup"} & delayed.keys()
    by_cache = parse_decode_config("FastDLLM", DREAM, {"cache": "dual"})
    assert resolved(by_cache)["block_size"] == 32
    assert "steps" not in resolved(by_cache)
    assert resolved(by_cache, cache="none")["steps"] == 2


def test_progress_thresholds_belong_to_multi_block_only() -> None:
    with pytest.raises(ConfigError, match="block_add_threshold"):
        parse_decode_config("EntropyThreshold", LLADA, {"block_add_threshold": 0.1})


@pytest.mark.parametrize(
    "options",
    [
        {"algorithms": ["LLaDA"]},
        {"algorithms": {"LLaDA": 3}},
        {"algorithms": {"Nope": {}}},
        {"algorithms": {"LLaDA": {"steps": 0}}},
        {"algorithm": "FastDLLM"},
        {"algorithms": {"LLaDA": {"algorithm": "Dream"}}},
        {"threshold": 1.0, "algorithms": {"FullAttnMultiBlock": {"threshold": 2.0}}},
    ],
)
def test_wrong_options_of_other_algorithms_end_the_launch(options: dict) -> None:
    with pytest.raises(ConfigError, match="--dllm-algorithm-config: "):
        parse_decode_config("FullAttnMultiBlock", LLADA, options)


@pytest.mark.parametrize("algorithm", ["LowConfidence", "Nope", ""])
def test_an_unknown_algorithm_lists_ours(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=", ".join(algorithms())):
        parse_decode_config(algorithm, DREAM, {})


@pytest.mark.parametrize(
    "text", ["- a list\n", "key: [unclosed\n", "just words\n", "\xff"]
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "dllm.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        load_decode_config("FullAttnMultiBlock", LLADA, str(file))
    assert "--dllm-algorithm-config" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named_and_an_empty_one_means_defaults(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        load_decode_config("FullAttnMultiBlock", LLADA, str(tmp_path / "no.yaml"))
    (tmp_path / "empty.yaml").touch()
    found = load_decode_config(
        "FullAttnMultiBlock", LLADA, str(tmp_path / "empty.yaml")
    )
    assert found == parse_decode_config("FullAttnMultiBlock", LLADA, {})


def hf_config(**fields: object) -> SimpleNamespace:
    values: dict[str, object] = {
        "architectures": ["LLaDAModelLM"],
        "vocab_size": 100,
        "mask_token_id": 9,
        "eos_token_id": 5,
    }
    return SimpleNamespace(**{**values, **fields})


def test_ids_come_from_the_checkpoint() -> None:
    facts = ModelFacts.from_hf_config(hf_config(eos_token_id=[5, 6]))
    assert (facts.mask_id, facts.eos_ids, facts.vocab_size) == (9, (5, 6), 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mask_token_id", None), ("mask_token_id", 100), ("eos_token_id", -1)],
)
def test_a_checkpoint_without_its_ids_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelFacts.from_hf_config(hf_config(**{field: value}))
