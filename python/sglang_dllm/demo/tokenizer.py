"""Builds the demo tokenizer: whole words of the problems, single digits, raw bytes.

Text outside the problems' vocabulary becomes its UTF-8 bytes, so that every text
round-trips. The special tokens and the chat template are LLaDA's.

    python -m sglang_dllm.demo.tokenizer --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sglang_dllm.demo.problems import problems

# A digit is a token of its own; a leading space belongs to the token after it.
PATTERN = r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_TURN = "<|eot_id|>"
SPECIAL = (BOS, EOS, START_HEADER, END_HEADER, END_TURN, MASK)

# Words of prompts and greetings. No generated problem contains them.
EXTRA = (
    "user assistant system Q A : Question Answer What what is How many "
    "the The a A and of to in it I you We we are was Hello hello Hi please Please"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def chat_prompt(turns: list[tuple[str, str]]) -> str:
    """The text of the chat template, without a run of jinja for each example."""
    text = "".join(
        f"{START_HEADER}{role}{END_HEADER}\n\n{content}{END_TURN}"
        for role, content in turns
    )
    return f"{BOS}{text}{START_HEADER}assistant{END_HEADER}\n\n"


def build_tokenizer(num_problems: int = 20_000) -> Tokenizer:
    """A byte-level BPE of the words of `num_problems` training problems."""
    pieces = {f"{space}{word}" for word in EXTRA.split() for space in ("", " ")}
    pieces |= {"\n", "\n\n"}
    pieces |= {f"{space}{digit}" for space in ("", " ") for digit in range(10)}
    for problem in islice(problems(0, "train"), num_problems):
        pieces |= set(re.findall(PATTERN, f"{problem.question}\n{problem.answer}"))
        pieces |= set(re.findall(PATTERN, f" {problem.question}"))

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *sorted(words - set(alphabet))]

    # Without merges, a known word is one token, and any other piece its bytes.
    model = models.BPE(
        vocab={entry: i for i, entry in enumerate(entries)},
        merges=[],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' PreTrainedTokenizerFast loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "mask_token": MASK}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": [START_HEADER, END_HEADER, END_TURN],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, args.out)
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
