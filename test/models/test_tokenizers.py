"""The stand-in of Dream's tokenizer keeps the ids and flags of its files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.tiny_checkpoints import DREAM_TEMPLATE, byte_symbols, write_json
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.models.tokenizers import plain_tokenizer_path

EOS, MASK = "<|endoftext|>", "<|mask|>"
MERGES = ("h e", "l l")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def flags(text: str, **changed: bool) -> dict[str, Any]:
    names = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": text, **dict.fromkeys(names, False), "special": True, **changed}


def write_slow(
    path: Path, added: dict[int, Any], kind: str | None = "DreamTokenizer", **more: Any
) -> str:
    """The files of Dream's own tokenizer: no tokenizer.json. Byte b has the id b."""
    path.mkdir()
    words = [*byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
    write_json(path / "vocab.json", {word: i for i, word in enumerate(words)})
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    decoder = {
        str(i): text if isinstance(text, dict) else flags(text)
        for i, text in added.items()
    }
    config = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": DREAM_TEMPLATE,
        "eos_token": EOS,
        "mask_token": MASK,
        "pad_token": EOS,
        "tokenizer_class": kind,
    }
    write_json(path / "tokenizer_config.json", config | more)
    return str(path)


@pytest.mark.parametrize(
    "added",
    [
        {258: EOS, 259: MASK},  # no gap
        {300: EOS, 301: MASK},
        {301: EOS, 300: MASK},
        {258: EOS, 400: MASK},
    ],
)
@pytest.mark.parametrize("kind", ["DreamTokenizer", "Qwen2Tokenizer", None])
def test_added_tokens_keep_their_ids(
    added: dict[int, str], kind: str | None, tmp_path: Path
) -> None:
    path = plain_tokenizer_path(write_slow(tmp_path / "slow", added, kind))
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = {text: i for i, text in added.items()}
    assert tokenizer.convert_tokens_to_ids([EOS, MASK]) == [ids[EOS], ids[MASK]]
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (ids[EOS], ids[MASK])
    text = f"hello{MASK} é{EOS}"
    encoded = tokenizer.encode(text)
    spaced = [32, 195, 169]
    assert encoded == [256, 257, 111, ids[MASK], *spaced, ids[EOS]]
    assert tokenizer.decode(encoded) == text
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "hello é"
    assert tokenizer.chat_template == DREAM_TEMPLATE


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    wide = flags("<x>", lstrip=True, rstrip=True, special=False)
    added = {300: EOS, 301: MASK, 310: wide}
    path = plain_tokenizer_path(write_slow(tmp_path / "slow", added))
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("a <x> b") == [97, 310, 98]
    assert tokenizer.decode([97, 310, 98], skip_special_tokens=True) == "a<x>b"


def test_the_ids_of_an_added_tokens_file(tmp_path: Path) -> None:
    path = write_slow(tmp_path / "slow", {})
    write_json(tmp_path / "slow" / "added_tokens.json", {EOS: 300, MASK: 305})
    tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer_path(path))
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (300, 305)


def test_another_eos_token_is_another_stand_in(tmp_path: Path) -> None:
    added = {300: EOS, 301: MASK}
    paths = {
        plain_tokenizer_path(write_slow(tmp_path / name, added, eos_token=name))
        for name in (EOS, MASK)
    }
    assert len(paths) == 2


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({200: EOS, 301: MASK}, f"'{EOS}' the id 200"),
        ({300: EOS, 301: "he"}, "'he' the id 301"),
        ({300: EOS}, f"'{MASK}' and gives it no id"),
    ],
)
def test_files_that_contradict_each_other(
    added: dict[int, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        plain_tokenizer_path(write_slow(tmp_path / "slow", added))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("kind", "gone", "text", "named"),
    [
        ("DreamTokenizer", "merges.txt", None, "cannot be read"),
        ("DreamTokenizer", "vocab.json", None, "there is no tokenizer"),
        ("DreamTokenizer", "merges.txt", "#version: 0.2\nx\n", "cannot be read"),
        ("DreamTokenizer", "tokenizer_config.json", "{", "tokenizer_config.json"),
        ("PreTrainedTokenizerFast", "tokenizer_config.json", None, "tokenizer.json"),
    ],
)
def test_files_that_are_missing_or_broken(
    kind: str, gone: str, text: str | None, named: str, tmp_path: Path
) -> None:
    path = write_slow(tmp_path / "slow", {300: EOS, 301: MASK}, kind)
    (tmp_path / "slow" / gone).unlink()
    if text is not None:
        (tmp_path / "slow" / gone).write_text(text)
    with pytest.raises(ConfigError) as error:
        plain_tokenizer_path(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_no_home_to_save_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_slow(tmp_path / "slow", {300: EOS, 301: MASK})
    found = plain_tokenizer_path(path)
    assert Path(found).is_relative_to(tmp_path)
    assert plain_tokenizer_path(path) == found
    assert json.loads((Path(found) / "tokenizer.json").read_text())


def test_ids_that_config_and_tokenizer_disagree_on(tmp_path: Path) -> None:
    path = plain_tokenizer_path(write_slow(tmp_path / "slow", {300: EOS, 301: MASK}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    family = FAMILIES["DreamModel"]
    assert ModelFacts(family, 301, (257, 300), 400).differences_from(tokenizer) == []
    assert ModelFacts(family, 301, (300,), 400).differences_from(None) == []
    mask, eos = ModelFacts(family, 280, (257,), 400).differences_from(tokenizer)
    assert "mask_token_id=280" in mask and "301" in mask
    assert "eos_token_id=257" in eos and "300" in eos
