"""Checkpoints that name remote code load without running any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from helpers.tiny_checkpoints import DREAM_TEMPLATE, write_dream, write_llada
from helpers.tiny_llama_checkpoints import write_llada_moe
from sglang_dllm.models.configs import (
    DreamConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    register_configs,
)
from sglang_dllm.models.tokenizers import plain_tokenizer_path


@pytest.mark.parametrize("trust", [False, True])
def test_config_classes_are_ours(tmp_path: Path, trust: bool) -> None:
    """--trust-remote-code is accepted and changes nothing."""
    register_configs()
    write_llada(tmp_path / "llada", n_kv_heads=2, seed=1)
    write_dream(tmp_path / "dream", seed=1)
    for name, kind in (("llada", LLaDAConfig), ("dream", DreamConfig)):
        folder = tmp_path / name
        for module in ("configuration_llada", "configuration_dream"):
            (folder / f"{module}.py").write_text("raise SystemExit('it ran')\n")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        assert type(config) is kind
        assert config.hidden_size == 64 and config.num_key_value_heads == 2


@pytest.mark.parametrize("architecture", ["LLaDAMoEModelLM", "LLaDAMoEModel"])
@pytest.mark.parametrize("model_type", ["llada", "llada_moe"])
def test_a_moe_under_the_dense_models_type_gets_its_own_config(
    tmp_path: Path, architecture: str, model_type: str
) -> None:
    register_configs()
    write_llada_moe(tmp_path, architecture=architecture, num_key_value_heads=2)
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"model_type": model_type})
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LLaDAMoEConfig
    assert config.num_key_value_heads == 2 and config.num_experts == 8
    assert config.norm_topk_prob is False


def byte_level_vocab() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}


@pytest.fixture
def dream_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokenizer files in the layout of the real Dream checkpoints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "dream"
    folder.mkdir()
    vocab = byte_level_vocab()
    vocab["he"], vocab["llo"] = len(vocab), len(vocab) + 1
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    added = {
        str(300 + i): {"content": token, "special": True}
        for i, token in enumerate(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
        )
    }
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": DREAM_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('it ran')\n")
    return folder


def test_dreams_tokenizer_becomes_transformers_own(dream_tokenizer: Path) -> None:
    path = plain_tokenizer_path(str(dream_tokenizer))
    assert path != str(dream_tokenizer)
    assert plain_tokenizer_path(str(dream_tokenizer)) == path
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("he said<|mask|>").input_ids
    assert ids[0] == byte_level_vocab().__len__()
    assert ids[-1] == tokenizer.mask_token_id
    assert tokenizer.decode(ids) == "he said<|mask|>"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>assistant\n")
    assert rendered.startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_a_tokenizer_of_transformers_stays_where_it_is(tmp_path: Path) -> None:
    write_llada(tmp_path / "llada", seed=1)
    path = str(tmp_path / "llada")
    assert plain_tokenizer_path(path) == path
