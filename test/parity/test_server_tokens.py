"""The server answers with the tokens of the plain references: each algorithm, alone and
in crowds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from helpers.random_settings import ALGORITHMS, Case
from helpers.scores import expected_score
from helpers.serving_harness import Server
from helpers.tiny_a2d_checkpoints import QWEN_TOKENS, write_a2d_qwen3
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
    # These differ from the others in the model alone, and test_logits compares it.
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
    "a2d": Kind(
        "LLaDA",
        lambda path: write_a2d_qwen3(path, seed=5),
        QWEN_TOKENS["<|im_end|>"],
        cases=2,
    ),
}
CHAT_KWARGS = {"a2d": [{}, {"enable_thinking": False}], "diffullama": []}
"""Kinds whose template has such words, or that have no template."""
MESSAGES = [{"role": "user", "content": "a"}]


@dataclass
class Setup(Oracle):
    name: str
    path: Path
    server: Server

    def ask(self, case: Case) -> dict[str, Any]:
        return self.server.generate(list(case.prompt), **case.sampling_params())

    def check_answer(self, case: Case, answer: dict[str, Any]) -> bool:
        """Assert the reference's answer; False where float32 noise decides."""
        ids, meta = answer["output_ids"], answer["meta_info"]
        if not self.check(case, ids, meta):
            return False
        is_whole = len(ids) == case.length
        is_given = case.template is not None and case.template[-1] is not None
        reason = "length" if is_whole and not is_given else "stop"
        assert meta["finish_reason"]["type"] == reason
        given = case.template or [None] * case.length
        num_filled = given[: len(ids)].count(None)
        assert meta["completion_tokens"] == num_filled
        assert meta["prompt_tokens"] == len(case.prompt) + case.length - case.num_masks
        if case.template is not None:
            filled = [token for gap in meta["dllm"]["gaps"] for token in gap["ids"]]
            pairs = zip(ids, given, strict=False)
            assert filled == [token for token, wanted in pairs if wanted is None]
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
    yield Setup(kind, load(checkpoint), request.param, checkpoint, server)
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
    equal = [setup.check_answer(case, setup.ask(case)) for case in cases]
    assert sum(equal) >= len(cases) - 1, "too many cases within noise"


def test_mixed_in_crowds_of_16_arriving_at_random_times(setup: Setup) -> None:
    rng = random.Random(4)
    cases = [case for name in ALGORITHMS for case in setup.cases(name, 2)]
    rng.shuffle(cases)
    answers = crowd_of_16(setup, cases, rng)
    equal = [setup.check_answer(c, a) for c, a in zip(cases, answers, strict=True)]
    assert sum(equal) >= len(cases) - 4, "too many cases within noise"
    setup.server.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 8}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 8}),
        ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 8}}),
    ],
)
def test_a_chat_needs_a_template(setup: Setup, path: str, body: dict[str, Any]) -> None:
    answer = setup.server.post(path, model=str(setup.path), stream=False, **body)
    has_template = CHAT_KWARGS.get(setup.name) != []
    assert answer.status_code == (200 if has_template else 400), answer.text
    assert has_template or "chat template" in answer.text.replace("_", " ")


def test_answers_that_find_their_length(setup: Setup) -> None:
    """Every rule, alone and in crowds."""
    cases = setup.growing_cases(1)[: 4 * setup.kind.cases]
    answers = [setup.ask(case) for case in cases[:10]]
    answers += crowd_of_16(setup, cases[10:], random.Random(5))
    equal = [setup.check_growing(c, a) for c, a in zip(cases, answers, strict=True)]
    assert sum(equal) >= len(cases) - 2, "too many cases within noise"
    setup.server.wait_until_idle()


@pytest.mark.parametrize("length", [200, 300])
def test_long_answers(setup: Setup, length: int) -> None:
    for algorithm in ("FullAttnMultiBlock", "AdaBlock", "AdaptiveParallel"):
        case = Case((65, 66, 67), length, algorithm, {}, ignore_eos=True)
        setup.check_answer(case, setup.ask(case))


def test_a_prompt_of_mask_tokens_stays_as_it_is(setup: Setup) -> None:
    mask = setup.model.mask_id
    for algorithm in ALGORITHMS:
        case = Case((mask, 65, mask, mask), 24, algorithm, {})
        answer = setup.ask(case)
        assert setup.check_answer(case, answer)
        assert mask not in answer["output_ids"]


def test_scores_beside_generation(setup: Setup) -> None:
    """Sums within 1e-4 of the plain references, and tokens as without scores."""
    rng, mask = random.Random(6), setup.model.mask_id
    letters = [token for token in range(32, 90) if token != mask]
    scores: list[dict[str, Any]] = [
        {"method": "chain"},
        {"method": "confidence"},
        {"method": "greedy"},
        {"method": "mc", "num_samples": 5, "batch_size": 4},
        {"method": "mc", "num_samples": 3, "cfg_scale": 1.5},
    ]
    asked = [
        (score, rng.choices(letters, k=4), rng.choices(letters, k=num), seed)
        for seed, score in enumerate(scores)
        for num in (1, 9)
    ]
    case = Case((65, 66), 40, "FullAttnMultiBlock", {}, ignore_eos=True)

    def ask(one: tuple[dict[str, Any], list[int], list[int], int]) -> dict[str, Any]:
        score, prompt, target, seed = one
        dllm = {"score": {**score, "continuation": target}}
        return setup.server.generate(
            prompt, sampling_seed=seed, custom_params={"dllm": dllm}
        )

    with ThreadPoolExecutor(16) as pool:
        generated = pool.submit(setup.ask, case)
        answers = list(pool.map(ask, asked))
    assert generated.result()["output_ids"] == setup.ask(case)["output_ids"]
    for (score, prompt, target, seed), answer in zip(asked, answers, strict=True):
        found = answer["meta_info"]["score"]
        expected = expected_score(setup.model, prompt, target, mask, score, seed)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=1e-4), (score, key)
        assert answer["output_ids"] == []
    setup.server.wait_until_idle()


def test_yaml_gives_the_defaults(setup: Setup) -> None:
    for algorithm in ("FullAttnMultiBlock", "FastDLLM"):
        answer = setup.ask(Case((65,), 8, algorithm, {}))
        wanted = setup.kind.yaml.get("algorithms", {}).get(algorithm, {})
        if algorithm == "FullAttnMultiBlock":
            wanted = {k: v for k, v in setup.kind.yaml.items() if k == "threshold"}
        assert wanted.items() <= answer["meta_info"]["dllm"].items()


def test_chat_renders_the_template_of_the_checkpoint(setup: Setup) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(setup.path)
    messages = [{"role": "user", "content": "how far in 8 hours?"}]
    for kwargs in CHAT_KWARGS.get(setup.name, [{}]):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **kwargs
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        chat = setup.server.post(
            "/v1/chat/completions",
            model="tiny",
            messages=messages,
            max_tokens=24,
            temperature=0,
            chat_template_kwargs=kwargs,
        ).json()
        plain = setup.server.generate(ids, max_new_tokens=24, temperature=0)
        assert chat["usage"]["prompt_tokens"] == len(ids)
        assert chat["choices"][0]["message"]["content"] == plain["text"]
