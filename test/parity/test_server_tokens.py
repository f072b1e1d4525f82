"""The server answers with the tokens of the plain references: each algorithm, alone and
in crowds."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.random_settings import ALGORITHMS, Case, random_case
from helpers.serving_harness import Server
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
from helpers.toy_model import reference_sampling
from reference.algorithms import nfe_at_visible, run
from reference.decoding import Result
from reference.models import ReferenceModel, load

NOISE = 2e-5
"""In nats, logits or probabilities. Forwards of a batch and of one canvas round float32
numbers differently, by less than this."""

NEWLINE = 10  # the tiny tokenizers are of bytes


@dataclass(frozen=True)
class Kind:
    """One architecture: its checkpoint, its launch flags and its number of cases."""

    sampler_family: str
    write: Callable[[Path], Path]
    eot_token: int | None = None
    flags: tuple[str, ...] = ()
    yaml: dict[str, Any] = field(default_factory=dict)
    cases: int = 10


KINDS = {
    "llada": Kind(
        "LLaDA",
        lambda path: write_llada(path, n_kv_heads=2, num_shards=3, seed=1),
        LLADA_TOKENS["<|eot_id|>"],
        yaml={
            "threshold": 0.3,
            "steps_per_round": 1,
            "prelaunch": True,  # a GPU's default
            "algorithms": {"FastDLLM": {"threshold": 0.7}},
        },
    ),
    "dream": Kind(
        "Dream",
        lambda path: write_dream(path, seed=2),
        DREAM_TOKENS["<|im_end|>"],
    ),
    # These two differ from the others in the model alone, and test_logits compares it.
    "llada-moe": Kind(
        "LLaDA",
        lambda path: write_llada_moe(path, seed=3),
        LLADA_MOE_TOKENS["<|role_end|>"],
        LLADA_MOE_FLAGS,
        cases=2,
    ),
    "diffullama": Kind(
        "Dream",
        lambda path: write_diffullama(path, seed=4),
        flags=DIFFULLAMA_FLAGS,
        yaml={"prelaunch": True},
        cases=2,
    ),
}


@dataclass
class Setup:
    kind: Kind
    server: Server
    model: ReferenceModel

    @property
    def tokens(self) -> list[int]:
        vocab_size = self.model.module.config.vocab_size
        return [t for t in range(vocab_size) if t != self.model.eos_id]

    def cases(self, algorithm: str, seed: int) -> list[Case]:
        rng = random.Random(f"{algorithm}-{seed}")
        return [
            random_case(rng, algorithm, self.kind.sampler_family, self.tokens)
            for _ in range(self.kind.cases)
        ]

    def expected(self, case: Case) -> Result:
        given = self.kind.yaml
        defaults = dict(given.get("algorithms", {}).get(case.algorithm, {}))
        if case.algorithm == "FullAttnMultiBlock":
            server = ("algorithms", "steps_per_round", "prelaunch")
            defaults = {key: given[key] for key in given if key not in server}
        if "factor" in case.options:
            defaults = {"threshold": None}
        options = {**defaults, **case.options}
        if case.ignore_eos and case.algorithm == "FullAttnMultiBlock":
            options["early_stop"] = False
        return run(
            case.algorithm,
            self.model,
            list(case.prompt),
            case.length,
            options,
            reference_sampling(case.sampling),
            family=self.kind.sampler_family.lower(),
            mask_id=self.model.mask_id,
            eos_id=self.model.eos_id,
            eot_token_id=self.kind.eot_token,
            delimiter_ids=options.get("delimiter_ids") or [NEWLINE],
        )

    def ask(self, case: Case) -> dict[str, Any]:
        return self.server.generate(list(case.prompt), **case.sampling_params())

    def check(self, case: Case, answer: dict[str, Any]) -> bool:
        """Assert equal tokens and forwards.

        Returns:
            True if they are. A choice that float32 noise decides may differ.
        """
        expected, eos = self.expected(case), self.model.eos_id
        ids, ends = expected.ids, "length"
        nfe = expected.nfe
        if eos in ids and not case.ignore_eos:
            ids, ends = ids[: ids.index(eos)], "stop"
            nfe = nfe_at_visible(expected, eos)
        meta = answer["meta_info"]
        if answer["output_ids"] != ids or meta["num_forwards"] != nfe:
            closest = min(step.margin for step in expected.trace)
            assert closest < NOISE, (case, answer["output_ids"], ids, meta, closest)
            warnings.warn(f"{case}: decided within float32 noise", stacklevel=2)
            return False
        if nfe == expected.nfe:  # else the server ended before the reference did
            for key in ("tokens_computed", "tokens_cached", "full_refreshes"):
                assert meta[key] == getattr(expected, key), (case, key)
        assert meta["finish_reason"]["type"] == ends
        assert meta["completion_tokens"] == len(ids)
        assert meta["canvas_len"] == len(case.prompt) + case.length
        assert meta["dllm"]["algorithm"] == case.algorithm
        assert case.options.items() <= meta["dllm"].items()
        return True


@pytest.fixture(scope="module", params=KINDS)
def setup(
    request: pytest.FixtureRequest,
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setup]:
    kind = KINDS[request.param]
    checkpoint = kind.write(tmp_path_factory.mktemp(request.param))
    file = tmp_path_factory.mktemp("yaml") / "dllm.yaml"
    file.write_text(yaml.safe_dump(kind.yaml))
    server = start_server(
        checkpoint,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
        *kind.flags,
    )
    yield Setup(kind, server, load(checkpoint))
    server.stop()


def crowd_of_16(
    setup: Setup, cases: list[Case], rng: random.Random
) -> list[dict[str, Any]]:
    """Ask all cases at random times, 16 at once; answers in the order of the cases."""
    answers: dict[int, dict[str, Any]] = {}
    gate = threading.Semaphore(16)

    def ask(index: int) -> None:
        with gate:
            answers[index] = setup.ask(cases[index])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
        time.sleep(rng.random() * 0.02)
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(cases))]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_alone(setup: Setup, algorithm: str) -> None:
    cases = setup.cases(algorithm, 1)
    equal = [setup.check(case, setup.ask(case)) for case in cases]
    assert sum(equal) >= len(cases) - 1, "too many cases within noise"


def test_mixed_in_crowds_of_16_arriving_at_random_times(setup: Setup) -> None:
    rng = random.Random(4)
    cases = [case for name in ALGORITHMS for case in setup.cases(name, 2)]
    rng.shuffle(cases)
    answers = crowd_of_16(setup, cases, rng)
    equal = [setup.check(c, a) for c, a in zip(cases, answers, strict=True)]
    assert sum(equal) >= len(cases) - 4, "too many cases within noise"
    setup.server.wait_until_idle()


@pytest.mark.parametrize("length", [200, 300])
def test_long_answers(setup: Setup, length: int) -> None:
    for algorithm in ("FullAttnMultiBlock", "AdaBlock", "AdaptiveParallel"):
        case = Case((65, 66, 67), length, algorithm, {}, ignore_eos=True)
        setup.check(case, setup.ask(case))


def test_a_prompt_of_mask_tokens_stays_as_it_is(setup: Setup) -> None:
    mask = setup.model.mask_id
    for algorithm in ALGORITHMS:
        case = Case((mask, 65, mask, mask), 24, algorithm, {})
        answer = setup.ask(case)
        assert setup.check(case, answer)
        assert mask not in answer["output_ids"]


def test_yaml_gives_the_defaults(setup: Setup) -> None:
    for algorithm in ("FullAttnMultiBlock", "FastDLLM"):
        answer = setup.ask(Case((65,), 8, algorithm, {}))
        wanted = setup.kind.yaml.get("algorithms", {}).get(algorithm, {})
        if algorithm == "FullAttnMultiBlock":
            wanted = {k: v for k, v in setup.kind.yaml.items() if k == "threshold"}
        assert wanted.items() <= answer["meta_info"]["dllm"].items()
