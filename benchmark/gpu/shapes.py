"""What is measured: the model folder, the sizes, and the requests that produce them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.roofline import LLADA_8B, ModelShape, Work

ROUND = 4
"""Forwards of one of the server's rounds: runs are whole rounds."""

FULL_ANSWER = 64
"""Masks behind the prompt where whole canvases are recomputed."""

DEFAULT_ALGORITHM = "LLaDA"


@dataclass(frozen=True)
class Case:
    """One forward: ``rows`` of each of ``batch`` canvases of ``context`` tokens.

    The prompt fills the canvas up to the answer, which is one block: with a cache, only
    a request's first and last forward are full. One mask is committed a forward, and
    ``max_forwards`` ends the request, so that the number of forwards is known.
    """

    rows: int
    context: int
    batch: int

    @property
    def is_full(self) -> bool:
        return self.rows == self.context

    @property
    def name(self) -> str:
        what = (
            f"full canvas {self.context}"
            if self.is_full
            else f"window {self.rows} context {self.context}"
        )
        return f"{what} batch {self.batch}"

    @property
    def answer_len(self) -> int:
        return min(FULL_ANSWER, self.context // 2) if self.is_full else self.rows

    @property
    def forwards(self) -> tuple[int, int]:
        """Of the short run, and the most of the long one.

        Requests sent together may start a round apart, which the difference of the two
        runs does not see as long as the short one has more rounds than that.
        """
        short = 2 * ROUND if not self.is_full and self.answer_len >= 32 else ROUND
        longest = min(self.answer_len - ROUND, short + (16 if self.is_full else 36))
        return short, longest // ROUND * ROUND

    def work(self, short: int, long: int) -> Work:
        """What one of the forwards that tell the runs apart computes, on average."""
        logits_indices = self.answer_len + 1 - (short + 1 + long) / 2
        return Work(self.rows, self.context, logits_indices, self.batch)

    def tokens_computed(self, forwards: int) -> int:
        """By a request of so many forwards, as its ``meta_info`` must say."""
        if self.is_full:
            return forwards * self.context
        return 2 * self.context + (forwards - 2) * self.rows

    def sampling(self, forwards: int) -> dict[str, Any]:
        """``sampling_params`` of a request that runs ``forwards`` forwards."""
        options = {
            "algorithm": DEFAULT_ALGORITHM,
            "block_size": self.answer_len,
            "steps": self.answer_len,
            "max_forwards": forwards,
            "cache": "none" if self.is_full else "dual",
        }
        return {
            "max_new_tokens": self.answer_len,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"dllm": options},
        }


@dataclass(frozen=True)
class Sizes:
    """The cases of a run: goals first, in case the time runs out."""

    goals: tuple[Case, ...]
    others: tuple[Case, ...]

    def __iter__(self) -> Iterator[Case]:
        yield from self.goals
        yield from self.others

    @property
    def most_tokens(self) -> int:
        return max(case.context * case.batch for case in self)

    @property
    def most_requests(self) -> int:
        return max(case.batch for case in self)


FULL_512 = Case(512, 512, 1)
WINDOW_64 = Case(64, 512, 1)
WINDOW_64_X16 = Case(64, 512, 16)


def sizes_of(
    canvases: tuple[int, ...],
    windows: tuple[int, ...],
    context: int,
    batches: tuple[int, ...],
    goals: tuple[Case, ...],
    quick: bool,
) -> Sizes:
    """All combinations; a quick run measures the goals alone."""
    shapes = [(size, size) for size in canvases] + [(size, context) for size in windows]
    cases = [Case(*shape, batch) for batch in batches for shape in shapes]
    others = [] if quick else [case for case in cases if case not in goals]
    return Sizes(goals, tuple(others))


def gpu_sizes(quick: bool) -> Sizes:
    goals = (FULL_512, WINDOW_64, WINDOW_64_X16)
    return sizes_of((256, 512, 1024), (32, 64, 128), 512, (1, 4, 16), goals, quick)


def cpu_sizes(quick: bool) -> Sizes:
    goals = (Case(64, 64, 1), Case(32, 64, 1), Case(32, 64, 4))
    return sizes_of((32, 64), (16, 32), 64, (1, 4), goals, quick)


def gpu_shape(layers: int | None, hidden: int | None) -> ModelShape:
    """LLaDA-8B's, or one of its kind: heads of 128, three times the width inside."""
    hidden, base = hidden or LLADA_8B.hidden, LLADA_8B
    heads = max(1, hidden // base.head_dim)
    return ModelShape(
        layers or base.layers, hidden, heads, heads, 3 * hidden, base.vocab, 2
    )


def cpu_shape(layers: int | None, hidden: int | None) -> ModelShape:
    """A tiny one, in float32."""
    hidden = hidden or 64
    heads = max(1, hidden // 16)
    return ModelShape(layers or 2, hidden, heads, heads, 3 * hidden, 512, 4)


def config_of(shape: ModelShape, mask_id: int, eos_id: int) -> dict[str, Any]:
    """LLaDA's config.json, without the fields that have one supported value."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "mlp_hidden_size": shape.ff,
        "vocab_size": shape.vocab,
        "embedding_size": shape.vocab,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": False,
        "mask_token_id": mask_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "torch_dtype": "bfloat16" if shape.dtype_bytes == 2 else "float32",
    }


def write_model(folder: Path, shape: ModelShape) -> Path:
    """A LLaDA folder without weights, for ``--load-format dummy``; returns it.

    The tokenizer has the bytes and the special tokens, which is enough: prompts are
    sent as ids. The weights are SGLang's, uniform within 0.001.
    """
    # Here, since it loads transformers.
    from helpers import tiny_checkpoints as tiny

    folder.mkdir(parents=True, exist_ok=True)
    ids = tiny.LLADA_TOKENS
    config = config_of(shape, ids["<|mdm_mask|>"], ids["<|endoftext|>"])
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    named = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    named["bos_token"] = "<|startoftext|>"
    size, template = tiny.MIN_VOCAB_SIZE, tiny.LLADA_TEMPLATE
    tiny.write_tokenizer(folder, ids, size, template, named)
    return folder
