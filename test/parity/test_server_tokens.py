"""The server's tokens equal the plain references, every algorithm, alone and mixed."""

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
from random_settings import ALGORITHMS, Case, random_case
from toy_model import reference_sampling

from reference.algorithms import nfe_at_visible, run
from reference.decoding import Result
from reference.models import ReferenceModel, load
from serving_harness import Server
from tiny_checkpoints import LLADA_TOKENS, write_dream, write_llada

NOISE = 2e-5
"""Nats, logits or probabilities: float32 differences of batched and single forwards
stay below."""

NEWLINE = 10  # the tiny tokenizers are of bytes
TURN_END = {"llada": LLADA_TOKENS["<|eot_id|>"], "dream": 259}
LINEAGE = {"llada": "LLaDA", "dream": "Dream"}
YAML = {
    "llada": {"threshold": 0.3, "algorithms": {"FastDLLM": {"threshold": 0.7}}},
    "dream": {},
}


@dataclass
class Setup:
    family: str
    server: Server
    model: ReferenceModel
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        vocab_size = self.model.module.config.vocab_size
        return [t for t in range(vocab_size) if t != self.model.eos_id]

    def cases(self, algorithm: str, seed: int, num: int) -> list[Case]:
        rng = random.Random(f"{algorithm}-{seed}")
        lineage = LINEAGE[self.family]
        return [random_case(rng, algorithm, lineage, self.tokens) for _ in range(num)]

    def expected(self, case: Case) -> Result:
        given = YAML[self.family]
        defaults = dict(given.get("algorithms", {}).get(case.algorithm, {}))
        if case.algorithm == "FullAttnMultiBlock":
            defaults = {key: given[key] for key in given if key != "algorithms"}
        if "factor" in case.options:
            defaults = {"threshold": None}
        options = {**defaults, **case.options}
        if case.ignore_eos and case.algorithm in ("FullAttnMultiBlock",):
            options["early_stop"] = False
        return run(
            case.algorithm,
            self.model.logits,
            list(case.prompt),
            case.length,
            options,
            reference_sampling(case.sampling),
            family=self.family,
            mask_id=self.model.mask_id,
            eos_id=self.model.eos_id,
            turn_end_id=TURN_END[self.family],
            delimiter_ids=options.get("delimiter_ids") or [NEWLINE],
        )

    def ask(self, case: Case) -> dict[str, Any]:
        return self.server.generate(list(case.prompt), **case.sampling_params())

    def check(self, case: Case, answer: dict[str, Any]) -> bool:
        """Equal tokens and forwards. False: decided within float32 noise."""
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
        assert meta["finish_reason"]["type"] == ends
        assert meta["completion_tokens"] == len(ids)
        assert meta["canvas_len"] == len(case.prompt) + case.length
        assert meta["dllm"]["algorithm"] == case.algorithm
        assert case.options.items() <= meta["dllm"].items()
        return True


@pytest.fixture(scope="module", params=["llada", "dream"])
def setup(
    request: pytest.FixtureRequest,
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setup]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    if family == "llada":
        checkpoint: Path = write_llada(folder, n_kv_heads=2, num_shards=3, seed=1)
    else:
        checkpoint = write_dream(folder, seed=2)
    file = tmp_path_factory.mktemp("yaml") / "dllm.yaml"
    file.write_text(yaml.safe_dump(YAML[family]))
    server = start_server(
        checkpoint,
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
    )
    yield Setup(family, server, load(checkpoint))
    server.stop()


def crowd_of_16(
    setup: Setup, cases: list[Case], rng: random.Random
) -> list[dict[str, Any]]:
    """Answers in the order of the cases, asked at random times, 16 at once."""
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
    cases = setup.cases(algorithm, 1, 8)
    equal = [setup.check(case, setup.ask(case)) for case in cases]
    assert sum(equal) >= len(cases) - 1, "too many cases within noise"


def test_mixed_in_crowds_of_16_arriving_at_random_times(setup: Setup) -> None:
    rng = random.Random(4)
    cases = [case for name in ALGORITHMS for case in setup.cases(name, 2, 10)]
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
        wanted = YAML[setup.family].get("algorithms", {}).get(algorithm, {})
        if algorithm == "FullAttnMultiBlock":
            wanted = {k: v for k, v in YAML[setup.family].items() if k == "threshold"}
        assert wanted.items() <= answer["meta_info"]["dllm"].items()
