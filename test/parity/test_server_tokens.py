"""The server's tokens equal the plain reference loops, alone and in crowds."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from reference.decoding import Result, multi_block, single_block
from reference.models import ReferenceModel, load
from serving_harness import Server
from tiny_checkpoints import write_dream, write_llada

NOISE = 2e-5
"""Nats or logits: float32 differences of batched and single forwards stay below."""

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_token_a_step": ("FullAttnMultiBlock", {"block_size": 4, "threshold": 0.0}),
    "published": ("FullAttnMultiBlock", {"early_stop": True}),
    "all_at_once": ("FullAttnMultiBlock", {"block_size": 8, "threshold": 999}),
    "single_block": ("EntropyThreshold", {"block_size": 16, "threshold": 1.5}),
}
PUBLISHED = {
    "llada": {"block_size": 32, "threshold": 0.5},
    "dream": {"block_size": 32, "threshold": 0.4},
}


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    length: int


@dataclass
class Setup:
    family: str
    name: str
    server: Server
    model: ReferenceModel

    def expected(self, case: Case, early_stop: bool | None = None) -> Result:
        return _expected(self.family, self.name, self.model, case, early_stop)

    def ask(self, case: Case, **sampling: Any) -> dict[str, Any]:
        return self.server.generate(
            list(case.prompt),
            max_new_tokens=case.length,
            temperature=0,
            skip_special_tokens=False,
            **sampling,
        )


@cache
def _expected(
    family: str,
    name: str,
    model: ReferenceModel,
    case: Case,
    early_stop: bool | None,
) -> Result:
    algorithm, options = SETTINGS[name]
    options = {**PUBLISHED[family], "early_stop": False, **options}
    if early_stop is not None:
        options["early_stop"] = early_stop
    if algorithm == "EntropyThreshold":
        return single_block(
            model.logits, list(case.prompt), case.length, **_facts(model), **options
        )
    return multi_block(
        model.logits,
        list(case.prompt),
        case.length,
        block_add_threshold=0.1,
        decoded_token_threshold=0.95,
        **_facts(model),
        **options,
    )


def _facts(model: ReferenceModel) -> dict[str, Any]:
    return {
        "family": model.family,
        "mask_id": model.mask_id,
        "eos_id": model.eos_id,
    }


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    write_llada(root / "llada", n_kv_heads=2, num_shards=3, seed=1)
    write_dream(root / "dream", seed=2)
    return {"llada": root / "llada", "dream": root / "dream"}


@pytest.fixture(
    scope="module",
    params=[(f, s) for f in ("llada", "dream") for s in SETTINGS],
    ids=lambda p: "-".join(p),
)
def setup(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setup:
    family, name = request.param
    algorithm, options = SETTINGS[name]
    early_stop = options.get("early_stop", False)
    file = tmp_path_factory.mktemp("yaml") / "dllm.yaml"
    file.write_text(yaml.safe_dump({**options, "early_stop": early_stop}))
    server = start_server(
        checkpoints[family],
        *("--dllm-algorithm", algorithm, "--dllm-algorithm-config", str(file)),
    )
    yield Setup(family, name, server, load(checkpoints[family]))
    server.stop()


def random_cases(model: ReferenceModel, seed: int, lengths: list[int]) -> list[Case]:
    rng = random.Random(seed)
    tokens = [t for t in range(model.module.config.vocab_size) if t != model.eos_id]
    return [
        Case(tuple(rng.choices(tokens, k=rng.choice([1, 2, 7, 19, 40]))), length)
        for length in lengths
    ]


LENGTHS = [1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 40, 64, 65, 96, 200, 300]


def check(setup: Setup, case: Case, answer: dict[str, Any], expected: Result) -> None:
    """Equal tokens and forwards, or a decision within float32 noise."""
    eos = setup.model.eos_id
    ids = expected.ids
    visible = ids[: ids.index(eos)] if eos in ids else ids
    meta = answer["meta_info"]
    if answer["output_ids"] != visible:
        closest = min(step.margin for step in expected.trace)
        assert closest < NOISE, (case, answer["output_ids"], visible, closest)
        warnings.warn(f"{case}: decided within float32 noise", stacklevel=2)
        return
    ended = "stop" if eos in ids else "length"
    assert meta["finish_reason"]["type"] == ended
    assert meta["completion_tokens"] == len(visible)
    assert meta["canvas_len"] == len(case.prompt) + case.length
    # Without early stop the reference decodes on behind the visible answer.
    assert meta["num_forwards"] <= expected.nfe
    if eos not in ids or SETTINGS[setup.name][1].get("early_stop"):
        assert meta["num_forwards"] == expected.nfe


def test_alone(setup: Setup) -> None:
    for case in random_cases(setup.model, 1, LENGTHS):
        check(setup, case, setup.ask(case), setup.expected(case))


def test_in_crowds_of_16_arriving_at_random_times(setup: Setup) -> None:
    cases = random_cases(setup.model, 2, LENGTHS) + random_cases(
        setup.model, 3, LENGTHS
    )
    rng = random.Random(4)
    rng.shuffle(cases)
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
    for index, case in enumerate(cases):
        check(setup, case, answers[index], setup.expected(case))
    setup.server.wait_until_idle()


def test_ignore_eos_is_the_reference_without_early_stop(setup: Setup) -> None:
    for case in random_cases(setup.model, 5, [16, 33, 64, 96]):
        answer = setup.ask(case, ignore_eos=True)
        expected = setup.expected(case, early_stop=False)
        if answer["output_ids"] != expected.ids:
            assert min(step.margin for step in expected.trace) < NOISE
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        assert answer["meta_info"]["num_forwards"] == expected.nfe


def test_a_prompt_of_mask_tokens_stays_as_it_is(setup: Setup) -> None:
    mask = setup.model.mask_id
    case = Case((mask, 65, mask, mask), 24)
    answer = setup.ask(case)
    check(setup, case, answer, setup.expected(case))
    assert mask not in answer["output_ids"]
