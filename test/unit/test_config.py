"""Decoding configuration: published defaults, ranges, one-line errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_dllm.config import ALGORITHMS, load_decode_config, parse_decode_config
from sglang_dllm.errors import ConfigError
from sglang_dllm.families import FAMILIES, ModelFacts

LLADA, DREAM = FAMILIES["LLaDAModelLM"], FAMILIES["DreamModel"]


def test_defaults_are_the_published_ones() -> None:
    llada = parse_decode_config("FullAttnMultiBlock", LLADA, {})
    dream = parse_decode_config("FullAttnMultiBlock", DREAM, {})
    assert (llada.block_size, llada.threshold, llada.early_stop) == (32, 0.5, True)
    assert (dream.block_size, dream.threshold, dream.early_stop) == (32, 0.4, False)
    assert (llada.block_add_progress, llada.activate_progress) == (0.1, 0.95)
    single = parse_decode_config("EntropyThreshold", LLADA, {})
    assert (single.block_add_progress, single.activate_progress) == (1.0, 1.0)


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
        ("threshold", None),
        ("block_add_threshold", 1.1),
        ("decoded_token_threshold", -1),
        ("decoded_token_threshold", [0.5]),
        ("early_stop", 1),
        ("early_stop", "yes"),
        ("cache_delay_iter", 2),
        ("refresh_interval", 3),
    ],
)
def test_a_wrong_value_is_named_with_its_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_decode_config("FullAttnMultiBlock", LLADA, {key: value})
    message = str(error.value)
    assert key in message and repr(value) in message and "expected" in message
    assert "\n" not in message


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'steps'.*known keys: block_si"):
        parse_decode_config("FullAttnMultiBlock", LLADA, {"steps": 8})


def test_progress_thresholds_belong_to_multi_block_only() -> None:
    with pytest.raises(ConfigError, match="block_add_threshold"):
        parse_decode_config("EntropyThreshold", LLADA, {"block_add_threshold": 0.1})


@pytest.mark.parametrize("algorithm", ["LowConfidence", "Nope", ""])
def test_an_unknown_algorithm_lists_ours(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=", ".join(ALGORITHMS)):
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
