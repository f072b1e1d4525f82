"""Two tensor-parallel ranks decode the tokens of the plain references: each family and
algorithm, mixed, on halves of every kind of layer."""

from __future__ import annotations

import pytest

from helpers.random_settings import ALGORITHMS, Case
from helpers.run_rank import RANKS, Job, Outcome, outcomes_of, start_ranks
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
from reference.models import load
from sglang_dllm.decoding.canvas import SamplingOptions

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


@pytest.fixture(scope="module")
def outcomes(
    oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """The outcomes of both ranks, by kind."""
    folder = tmp_path_factory.getbasetemp()
    jobs = [
        Job(str(next(folder.glob(f"ranks*/{name}"))), o.kind.flags, cases_of(o))
        for name, o in oracles.items()
    ]
    where = tmp_path_factory.mktemp("out")
    by_rank = outcomes_of(start_ranks(jobs, where), where)
    return dict(zip(oracles, map(list, zip(*by_rank, strict=True)), strict=True))


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
