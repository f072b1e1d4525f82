"""A config.json that our modules would compute wrongly is refused by its field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import base as rotary_base
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import AutoConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers.changed_checkpoints import change_config
from helpers.tiny_a2d_checkpoints import (
    write_a2d_llama,
    write_a2d_qwen2,
    write_a2d_qwen3,
    write_illada,
)
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import write_diffullama, write_llada_moe
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.__main__ import DOCUMENT, written
from sglang_dllm.models.config_check import check_config, rope_of, with_defaults
from sglang_dllm.models.config_fields import TABLES, Only, Read
from sglang_dllm.models.configs import register_configs

WRITERS: dict[str, Any] = {
    "LLaDAModelLM": write_llada,
    "DreamModel": write_dream,
    "LLaDAMoEModelLM": write_llada_moe,
    "DiffuLlamaModel": write_diffullama,
    "ILLaDAForCausalLM": write_illada,
    "A2DQwen3LMHeadModel": write_a2d_qwen3,
    "A2DQwen2LMHeadModel": write_a2d_qwen2,
    "A2DLlamaLMHeadModel": write_a2d_llama,
}
NEEDED = ("hidden_size", "num_attention_heads", "rms_norm_eps", "rope_theta")
NEEDED += ("max_position_embeddings", "vocab_size", "num_key_value_heads")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fields]:
    """A config.json of each family, as it is published."""
    root = tmp_path_factory.mktemp("published")
    return {
        name: json.loads((write(root / name) / "config.json").read_text())
        for name, write in WRITERS.items()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_a_published_file_passes(name: str, published: dict[str, Fields]) -> None:
    check_config(published[name], name)
    needed = [
        field
        for field, rule in TABLES[name].rules.items()
        if isinstance(rule, Read) and rule.is_needed
    ]
    needed += ["model_type", *(["rope_theta"] if TABLES[name].needs_theta else [])]
    nulls: Fields = dict.fromkeys(TABLES[name].rules)
    check_config(nulls | {field: published[name][field] for field in needed}, name)
    check_config(published[name] | {"brand_new": 7}, name)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("LLaDAModelLM", "clip_qkv", 1.0),
        ("LLaDAModelLM", "multi_query_attention", True),
        ("LLaDAModelLM", "layer_norm_with_affine", False),
        ("LLaDAModelLM", "scale_logits", True),
        ("LLaDAModelLM", "embedding_scale", 2.0),
        ("LLaDAModelLM", "activation_type", "swiglu"),
        ("LLaDAModelLM", "block_group_size", 4),
        ("LLaDAModelLM", "rope", False),
        ("LLaDAModelLM", "rope_scaling", LINEAR),
        ("LLaDAModelLM", "rope_scaling", {"type": "linear", "factor": 4.0}),
        ("LLaDAModelLM", "vocab_size", 400),
        ("LLaDAModelLM", "sliding_window", 16),
        ("DreamModel", "hidden_act", "gelu"),
        ("DreamModel", "use_sliding_window", True),
        ("DreamModel", "layer_types", ["full_attention", "sliding_attention"]),
        ("DreamModel", "head_dim", 32),
        ("DreamModel", "head_dim", "x"),
        ("DreamModel", "attention_bias", "no"),
        ("DreamModel", "hidden_size", "64"),
        ("DreamModel", "hidden_size", 10**30),
        ("DreamModel", "num_hidden_layers", True),
        ("DreamModel", "num_attention_heads", 0),
        ("DreamModel", "num_attention_heads", 3),
        ("DreamModel", "num_key_value_heads", 3),
        ("DreamModel", "rms_norm_eps", "1e-6"),
        ("DreamModel", "tie_word_embeddings", 2),
        ("DreamModel", "partial_rotary_factor", 0.5),
        ("DreamModel", "quantization_config", "fp8"),
        ("DreamModel", "quantization_config", {}),
        ("DreamModel", "model_type", "qwen2"),
        ("DreamModel", "model_type", None),
        ("DreamModel", "rope_theta", "x"),
        ("DreamModel", "rope_theta", 0),
        ("DreamModel", "rope_theta", math.nan),
        ("DreamModel", "rope_theta", 10**400),
        ("DreamModel", "rope_scaling", "x"),
        ("DreamModel", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("DreamModel", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("DreamModel", "rope_scaling", {"rope_type": 5}),
        ("DreamModel", "rope_scaling", {"rope_type": ["linear"]}),
        ("DreamModel", "rope_scaling", {"rope_type": "llama3"}),
        ("DreamModel", "rope_scaling", {**LLAMA3, "factor": "8"}),
        ("DreamModel", "rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}),
        ("DreamModel", "rope_scaling", {**LINEAR, "factor": 0.5}),
        (
            *("DreamModel", "rope_scaling"),
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 512,
            },
        ),
        ("DreamModel", "rope_scaling", {**LINEAR, "type": "yarn"}),
        ("DreamModel", "rope_scaling", {"type": "default", "mrope_section": [1, 2]}),
        ("DreamModel", "rope_scaling", {**LINEAR, "partial_rotary_factor": 0.5}),
        ("LLaDAMoEModelLM", "shared_expert_intermediate_size", 32),
        ("LLaDAMoEModelLM", "moe_layer_freq", [0, 1]),
        ("LLaDAMoEModelLM", "num_experts_per_tok", 9),
        ("LLaDAMoEModelLM", "router_num_group", 4),
        ("DiffuLlamaModel", "attention_bias", True),
        ("ILLaDAForCausalLM", "layer_norm_eps", 1e-5),
        ("ILLaDAForCausalLM", "attention_bias", True),
        ("ILLaDAForCausalLM", "rope_scaling", LINEAR),
        ("ILLaDAForCausalLM", "head_dim", 8),
        ("A2DQwen3LMHeadModel", "attention_bias", True),
        ("A2DQwen3LMHeadModel", "use_sliding_window", True),
        ("A2DQwen3LMHeadModel", "model_type", "qwen3"),
        ("A2DQwen3LMHeadModel", "layer_types", ["sliding_attention"] * 2),
        ("A2DQwen2LMHeadModel", "attention_bias", False),
        ("A2DQwen2LMHeadModel", "mlp_bias", True),
        ("A2DLlamaLMHeadModel", "hidden_act", "gelu"),
        ("DiffuLlamaModel", "head_dim", 15),
    ],
)
def test_another_value_is_named(
    name: str, field: str, value: Any, published: dict[str, Fields]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(published[name] | {field: value}, name)
    line = str(error.value)
    named = {"head_dim": "num_attention_heads"} if value == 15 else {}
    assert named.get(field, field) in line
    assert "expected" in line
    assert "\n" not in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("LLaDAModelLM", "multi_query_attention", False),
        ("LLaDAModelLM", "rope_scaling", {"rope_type": "default"}),
        ("LLaDAModelLM", "flash_attention", True),
        ("DreamModel", "sliding_window", 4096),
        ("DreamModel", "layer_types", ["full_attention"] * 2),
        ("DreamModel", "head_dim", 16),
        ("DreamModel", "rope_scaling", LINEAR),
        ("DreamModel", "rope_scaling", {**LINEAR, "finetuned": True}),
        ("DreamModel", "rope_scaling", {"rope_type": "default", "factor": 4.0}),
        ("DreamModel", "partial_rotary_factor", 1.0),
        ("LLaDAMoEModelLM", "moe_layer_freq", 1),
        ("LLaDAMoEModelLM", "routed_scaling_factor", 1.0),
        ("DiffuLlamaModel", "head_dim", 32),
    ],
)
def test_a_value_that_changes_nothing_or_is_computed_passes(
    name: str, field: str, value: Any, published: dict[str, Fields]
) -> None:
    check_config(published[name] | {field: value}, name)


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("field", NEEDED)
def test_a_field_without_a_published_default_must_be_there(
    field: str, value: Any, published: dict[str, Fields]
) -> None:
    fields = published["ILLaDAForCausalLM"] | {field: value}
    given = {name: x for name, x in fields.items() if x is not ...}
    with pytest.raises(ConfigError, match=f"config.json: {field}.* expected"):
        check_config(given, "ILLaDAForCausalLM")


def test_two_fields_that_disagree_are_named(published: dict[str, Fields]) -> None:
    dream = published["DreamModel"]
    with pytest.raises(ConfigError, match=r"rope_theta=1000000\.0 .*expected 5\.0"):
        check_config(dream | {"rope_parameters": {"rope_theta": 5.0}}, "DreamModel")


def test_every_table_allows_its_own_defaults() -> None:
    for name, table in TABLES.items():
        full = with_defaults({}, name)
        for rule in table.rules.values():
            if isinstance(rule, Only):
                assert rule.other
        named = {"model_type": table.model_types[0], "rope_theta": 500000.0}
        check_config(full | named, name)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        LINEAR,
        {**LLAMA3, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.5, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
        },
    ],
)
def test_the_angles_are_those_of_transformers(
    scaling: Fields,
    head_dim: int,
    published: dict[str, Fields],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A server has published its flags; SGLang asks for one of them here.
    flags = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(rotary_base, "get_exec", lambda: flags)
    positions = 512
    theta = 777.5
    fields = published["DreamModel"] | {
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    ours = rope_of(fields, "DreamModel")
    rotary = get_rope(
        head_dim,
        rotary_dim=head_dim,
        max_position=positions,
        base=ours.theta,
        rope_scaling=ours.for_sglang(),
        dtype=torch.float32,
    )
    config = Qwen2Config(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=positions,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    if scaling["rope_type"] == "default":
        steps = torch.arange(0, head_dim, 2) / head_dim
        inv_freq, factor = 1.0 / theta**steps, 1.0
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    angles = torch.arange(positions)[:, None] * inv_freq
    wanted = factor * torch.cat([angles.cos(), angles.sin()], dim=-1)
    found = rotary.cos_sin_cache[:positions]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * factor)


@pytest.mark.parametrize(
    ("fields", "without"),
    [
        ({"rope_theta": 777.5}, []),
        ({"rope_parameters": {"rope_theta": 777.5}}, ["rope_theta"]),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 777.5}}, []),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["LLaDAModelLM", "DreamModel", "LLaDAMoEModelLM", "A2DQwen3LMHeadModel"],
)
def test_theta_is_read_at_every_place(
    name: str, fields: Fields, without: list[str], tmp_path: Path
) -> None:
    register_configs()
    if "rope_scaling" in fields:
        without = ["rope_theta"]
    path = change_config(WRITERS[name](tmp_path / "model"), fields, without)
    config = AutoConfig.from_pretrained(path)
    assert config.rope_theta == 777.5
    assert config.rope_parameters["rope_theta"] == 777.5
    nothing: Fields = {"rope_theta": None, "rope_scaling": None}
    config.update({"rope_parameters": {"rope_theta": 5.5}, **nothing})
    assert (config.rope_theta, config.rope_parameters["rope_theta"]) == (5.5, 5.5)


def test_an_override_of_a_size_reaches_what_depends_on_it(tmp_path: Path) -> None:
    register_configs()
    path = change_config(write_llada(tmp_path / "model"), without=["n_kv_heads"])
    config = AutoConfig.from_pretrained(path)
    assert (config.n_heads, config.num_key_value_heads) == (4, 4)
    config.update({"n_heads": 8})
    assert (config.n_heads, config.num_key_value_heads) == (8, 8)
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LLaDAModelLM", "LLaDAConfig"),
        ("DreamModel", "DreamConfig"),
        ("LLaDAMoEModelLM", "LLaDAMoEConfig"),
    ],
)
@pytest.mark.parametrize("names", [None, "missing"])
def test_the_model_type_stands_in_for_the_architecture(
    name: str, kind: str, names: str | None, tmp_path: Path
) -> None:
    register_configs()
    path = WRITERS[name](tmp_path / "model")
    if names is None:
        change_config(path, {"architectures": None})
    else:
        change_config(path, without=["architectures"])
    config = AutoConfig.from_pretrained(path)
    assert config.architectures == [name]
    assert type(config).__name__ == kind


def test_the_document_has_these_tables() -> None:
    """``make format`` writes them."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == written(text)
    assert "| `clip_qkv` | refused unless `null` |" in text
