"""Two tensor-parallel ranks decode the tokens of the plain references: each family and
algorithm, mixed, on halves of every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.quantized_checkpoints import SCHEMES, quantize_folder
from helpers.random_settings import ALGORITHMS, Case
from helpers.run_rank import RANKS, Job, Outcome, outcomes_of, start_ranks
from helpers.tiny_a2d_checkpoints import (
    LLAMA3_TOKENS,
    QWEN_TOKENS,
    write_a2d_llama,
    write_a2d_qwen2,
    write_a2d_qwen3,
    write_illada,
)
from helpers.tiny_checkpoints import (
    DREAM_TOKENS,
    LLADA_TOKENS,
    write_dream,
    write_llada,
)
from helpers.tiny_llama_checkpoints import (
    DIFFULLAMA_FLAGS,
    LLADA_MOE_FLAGS,
    LLADA_MOE_TOKENS,
    write_diffullama,
    write_llada_moe,
)
from helpers.token_parity import Kind, Oracle
from reference.models import ReferenceModel, load
from sglang_dllm.decoding.canvas import SamplingOptions

TOLERANCE = 2e-4

KINDS = {
    # 300 tokens: the vocabulary is padded, and the second rank has the padding.
    "llada": Kind(
        "LLaDA",
        lambda path: write_llada(path, n_kv_heads=2, seed=1),
        LLADA_TOKENS["<|eot_id|>"],
        cases=2,
    ),
    # Both ranks keep the only head of keys and values.
    "dream": Kind(
        "Dream",
        lambda path: write_dream(path, num_key_value_heads=1, seed=2),
        DREAM_TOKENS["<|im_end|>"],
        cases=1,
    ),
    # Each rank has half of every expert.
    "llada-moe": Kind(
        "LLaDA",
        lambda path: write_llada_moe(path, seed=3),
        LLADA_MOE_TOKENS["<|role_end|>"],
        LLADA_MOE_FLAGS,
        cases=1,
    ),
    "diffullama": Kind(
        "Dream",
        lambda path: write_diffullama(path, seed=4),
        flags=DIFFULLAMA_FLAGS,
        cases=1,
    ),
    # The head is the embedding, and the mask id is the tokenizer's.
    "illada": Kind("LLaDA", lambda path: write_illada(path, seed=5), cases=1),
    "a2d-qwen3": Kind(
        "LLaDA",
        lambda path: write_a2d_qwen3(path, num_key_value_heads=1, seed=6),
        QWEN_TOKENS["<|im_end|>"],
        cases=1,
    ),
    "a2d-qwen2": Kind(
        "LLaDA",
        lambda path: write_a2d_qwen2(path, seed=7),
        QWEN_TOKENS["<|im_end|>"],
        cases=1,
    ),
    "a2d-llama": Kind(
        "LLaDA",
        lambda path: write_a2d_llama(path, tied=False, seed=8),
        LLAMA3_TOKENS["<|eot_id|>"],
        cases=1,
    ),
}


def cases_of(oracle: Oracle) -> list[Case]:
    """Each algorithm in turn, so that all of them meet in one batch."""
    by_algorithm = [oracle.cases(name, 5) for name in ALGORITHMS]
    cases = [case for row in zip(*by_algorithm, strict=True) for case in row]
    if oracle.kind.sampler_family == "LLaDA":
        # The algorithm asks for these logits itself.
        guided = {"cfg_scale": 1.5, "block_size": 8}
        drawn = SamplingOptions(temperature=0.7, seed=11)
        cases.insert(3, Case((65, 66, 67), 24, "LLaDA", guided, drawn))
    return cases


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    root = tmp_path_factory.mktemp("ranks")
    return {
        name: Oracle(kind, load(kind.write(root / name)))
        for name, kind in KINDS.items()
    }


# Each rank's part of a quantized matrix is whole groups or blocks of 128 rows.
SCHEMES_OF_RANKS = ("fp8", "ct-fp8-channels", "ct-int4", "awq", "gptq-marlin")
BATCHES = [[[7] * 33], [[65, 66, 67], list(range(40)), [5, 4, 3, 2, 1]]]


def quantized(root: Path, name: str) -> tuple[Job, ReferenceModel]:
    """A quantized checkpoint, and the reference of the weights that it stands for."""
    quantized_path, plain_path = (
        write_llada(
            root / f"{name}-{x}",
            vocab_size=320,
            d_model=256,
            n_kv_heads=2,
            mlp_hidden_size=512,
        )
        for x in ("quantized", "plain")
    )
    scheme = SCHEMES[name]
    quantize_folder(quantized_path, plain_path, scheme)
    job = Job(str(quantized_path), scheme.flags, batches=BATCHES, quantized=True)
    return job, load(plain_path)


def tied(root: Path) -> tuple[Job, ReferenceModel]:
    """A checkpoint whose head is its embedding, and one that has it twice."""
    folders = [write_dream(root / x, seed=9) for x in ("tied", "twice")]
    for folder in folders:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if folder.name == "tied":
            del tensors["lm_head.weight"]
            config = json.loads((folder / "config.json").read_text())
            config["tie_word_embeddings"] = True
            (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, file, metadata={"format": "pt"})
    return Job(str(folders[0]), batches=BATCHES), load(folders[1])


@pytest.fixture(scope="module")
def by_logits(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Job, ReferenceModel]]:
    root = tmp_path_factory.mktemp("logits")
    found = {"tied": tied(root)}
    return found | {name: quantized(root, name) for name in SCHEMES_OF_RANKS}


@pytest.fixture(scope="module")
def outcomes(
    oracles: dict[str, Oracle],
    by_logits: dict[str, tuple[Job, ReferenceModel]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[Outcome]]:
    """The outcomes of both ranks, by the name of their job."""
    folder = tmp_path_factory.getbasetemp()
    jobs = {
        name: Job(str(next(folder.glob(f"ranks*/{name}"))), o.kind.flags, cases_of(o))
        for name, o in oracles.items()
    }
    jobs |= {name: job for name, (job, _) in by_logits.items()}
    where = tmp_path_factory.mktemp("out")
    by_rank = outcomes_of(start_ranks(list(jobs.values()), where), where)
    return dict(zip(jobs, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("name", ["tied", *SCHEMES_OF_RANKS])
def test_the_logits_of_halves_are_those_of_the_whole(
    name: str,
    by_logits: dict[str, tuple[Job, ReferenceModel]],
    outcomes: dict[str, list[Outcome]],
) -> None:
    _, model = by_logits[name]
    for outcome in outcomes[name]:
        for ours, batch in zip(outcome.logits, BATCHES, strict=True):
            for one, ids in zip(ours, batch, strict=True):
                whole = model.raw_logits(torch.tensor(ids))
                assert whole.std() > 0.5 and one.shape == whole.shape
                assert (one - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_decode_the_tokens_of_the_reference(
    name: str, oracles: dict[str, Oracle], outcomes: dict[str, list[Outcome]]
) -> None:
    oracle, answers = oracles[name], outcomes[name][0].answers
    equal = [
        oracle.check(case, answer.ids, answer.meta)
        for case, answer in zip(cases_of(oracle), answers, strict=True)
    ]
    assert sum(equal) >= len(equal) - 2, "too many cases within noise"


@pytest.mark.parametrize("name", KINDS)
def test_both_ranks_decide_alike(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    first, second = (outcomes[name][rank].answers for rank in RANKS)
    assert first == second
