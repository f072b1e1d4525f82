"""The demo model's problems, tokenizer and shipped checkpoint."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import TEMPLATES, Problem, Split, problems
from sglang_dllm.demo.tokenizer import (
    END_HEADER,
    END_TURN,
    EOS,
    MASK,
    SPECIAL,
    START_HEADER,
    build_tokenizer,
    chat_prompt,
)

LINE = re.compile(r"(\d+) ([-+]) (\d+) = (\d+)")


def first(split: Split, num: int = 2000, seed: int = 3) -> list[Problem]:
    return list(islice(problems(seed, split), num))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((demo_path() / "config.json").read_text())


def test_same_seed_gives_same_problems() -> None:
    assert first("train", 50) == first("train", 50)
    assert first("train", 50) != first("train", 50, seed=4)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(split: Split) -> None:
    """Each line is true, and its operands are known from the question or before."""
    for problem in first(split):
        *lines, last = problem.answer.split("\n")
        known = set(map(int, re.findall(r"\d+", problem.question)))
        for line in lines:
            match = LINE.fullmatch(line)
            assert match, line
            a, b, result = int(match[1]), int(match[3]), int(match[4])
            value = {"+": a + b, "-": a - b}[match[2]]
            assert value == result, line
            assert {a, b} <= known, (problem.question, line)
            assert 0 <= result <= 100
            known.add(result)
        assert last == f"#### {result}" == f"#### {problem.value}"


def test_numbers_of_the_problem_are_those_of_its_question() -> None:
    for problem in first("train"):
        told = sorted(map(int, re.findall(r"\d+", problem.question)))
        assert told == sorted(problem.numbers), problem.question


def test_heldout_numbers_never_occur_in_training() -> None:
    train = {tuple(sorted(p.numbers)) for p in first("train", 10_000)}
    heldout = {tuple(sorted(p.numbers)) for p in first("heldout", 1000)}
    assert not train & heldout


def test_every_template_and_step_count_occurs() -> None:
    drawn = first("heldout", 500)
    assert len({p.template for p in drawn}) == len(set(TEMPLATES))
    assert {len(p.steps) for p in drawn} == {1, 2, 3}


@given(text=st.text())
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    """Text that spells a special token is excluded: it is that token."""
    if any(special in text for special in SPECIAL):
        return
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_problem_text_needs_no_byte_tokens(tokenizer: Any) -> None:
    for problem in first("heldout", 300):
        for text in (problem.question, problem.answer, f" {problem.answer}"):
            words = re.findall(r"\d|[A-Za-z]+|[^\sA-Za-z\d]+|\n", text)
            assert len(tokenizer(text).input_ids) == len(words), text


def test_chat_template_writes_the_only_bos(tokenizer: Any) -> None:
    turns = [("user", " What is 2 + 3? "), ("assistant", "5"), ("user", "And 4 + 4?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert text == chat_prompt([(role, content.strip()) for role, content in turns])
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_headers_and_digits_are_single_tokens(tokenizer: Any) -> None:
    prompt = f"{START_HEADER}assistant{END_HEADER}\n\n42 77{END_TURN}"
    tokens = [tokenizer.decode([i]) for i in tokenizer(prompt).input_ids]
    assert tokens == [
        *(START_HEADER, "assistant", END_HEADER, "\n\n"),
        *("4", "2", " 7", "7", END_TURN),
    ]


def test_shipped_tokenizer_is_the_one_the_script_builds(tokenizer: Any) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_config_names_the_tokenizers_ids(tokenizer: Any, config: Any) -> None:
    assert config["vocab_size"] == config["embedding_size"] == len(tokenizer)
    assert config["mask_token_id"] == tokenizer.convert_tokens_to_ids(MASK)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    assert config["eos_token_id"] == config["pad_token_id"] == eos
    assert config["bos_token_id"] == tokenizer.bos_token_id


def test_weights_have_the_shapes_of_the_config(config: Any) -> None:
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    vocab = config["vocab_size"]
    block = {
        "attn_norm": (width,),
        "ff_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (width, width),
        "v_proj": (width, width),
        "attn_out": (width, width),
        "ff_proj": (hidden, width),
        "up_proj": (hidden, width),
        "ff_out": (width, hidden),
    }
    expected = {"wte": (vocab, width), "ln_f": (width,), "ff_out": (vocab, width)}
    for layer in range(config["n_layers"]):
        expected |= {f"blocks.{layer}.{name}": dims for name, dims in block.items()}
    path = demo_path() / "model.safetensors"
    with safe_open(path, framework="pt") as weights:
        names = list(weights.keys())
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    assert found == {
        f"model.transformer.{name}.weight": dims for name, dims in expected.items()
    }
    assert config["d_model"] // config["n_heads"] in (32, 64, 128)
    assert path.stat().st_size < 20e6
