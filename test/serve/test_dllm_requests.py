"""One server decodes each request by the algorithm that the request names."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import DEMO

from helpers.random_settings import ALGORITHMS
from helpers.serving_harness import Server
from sglang_dllm.demo.problems import problems

THIRD_PARTY = Path(__file__).parent.parent / "helpers" / "third_party"

EIGHT = (
    {"algorithm": "LLaDA", "steps": 24, "cfg_scale": 0.5},
    {"algorithm": "Dream", "steps": 24, "alg": "topk_margin"},
    {"algorithm": "FastDLLM", "factor": 1.0},
    {"algorithm": "EntropyThreshold", "block_size": 8},
    {"algorithm": "LocalLeap", "anchor_threshold": 0.8},
    {"algorithm": "Hierarchical", "low_threshold": 0.5},
    {"algorithm": "Credit", "threshold": 0.8},
    {"algorithm": "AdaBlock"},
)

MALFORMED: list[tuple[Any, str]] = [
    *((bad, "custom_params.dllm") for bad in (5, "FastDLLM", [1], True, 1.5)),
    *(({"algorithm": bad}, "dllm.algorithm") for bad in ("Nope", "", 3, [], "llada")),
    *(({"unknown": bad}, "dllm.unknown") for bad in (1, "x", [])),
    *(({"block_size": bad}, "block_size") for bad in (0, -1, 4097, 1.5, "8", True)),
    *(({"threshold": bad}, "threshold") for bad in (-0.1, 1001, "0.5", True, [0.5])),
    *(({"max_forwards": bad}, "max_forwards") for bad in (0, -1, 100_001, 1.5, "3")),
    *(({"early_stop": bad}, "early_stop") for bad in (0, "true", [])),
    ({"block_add_threshold": 1.1}, "block_add_threshold"),
    ({"decoded_token_threshold": -0.1}, "decoded_token_threshold"),
    *(
        ({"algorithm": "LLaDA", **bad}, next(iter(bad)))
        for bad in (
            {"steps": 0},
            {"steps": 1, "block_size": 4},
            {"remasking": "high_confidence"},
            {"remasking": 1},
            {"cfg_scale": -0.5},
            {"cfg_scale": "1"},
            {"logits_eos_inf": 1},
            {"confidence_eos_eot_inf": "no"},
            {"threshold": 0.5},
            {"alg": "entropy"},
        )
    ),
    *(
        ({"algorithm": "Dream", **bad}, next(iter(bad)))
        for bad in (
            {"alg": "maskgit"},
            {"alg_temp": -1},
            {"eps": 0.6},
            {"steps": 10**6},
            {"block_size": 8},
        )
    ),
    *(
        ({"algorithm": "FastDLLM", **bad}, word)
        for bad, word in (
            ({"threshold": 0.5, "factor": 1.0}, "threshold and factor"),
            ({"threshold": 1.5}, "threshold"),
            ({"factor": -1}, "factor"),
            ({"steps": 4}, "steps"),
        )
    ),
    ({"algorithm": "LocalLeap", "radius": -1}, "radius"),
    ({"algorithm": "LocalLeap", "anchor_threshold": 2}, "anchor_threshold"),
    ({"algorithm": "LocalLeap", "neighbor_threshold": "0.5"}, "neighbor_threshold"),
    ({"algorithm": "AdaptiveParallel", "max_parallel": 0}, "max_parallel"),
    ({"algorithm": "AdaptiveParallel", "block_size": 8}, "block_size"),
    ({"algorithm": "Hierarchical", "low_threshold": -1}, "low_threshold"),
    ({"algorithm": "Credit", "decay_beta": 1.1}, "decay_beta"),
    ({"algorithm": "Credit", "credit_alpha": 101}, "credit_alpha"),
    ({"algorithm": "AdaBlock", "delimiter_threshold": 1.1}, "delimiter_threshold"),
    ({"algorithm": "AdaBlock", "delimiter_ids": [-1]}, "delimiter_ids"),
    ({"algorithm": "AdaBlock", "delimiter_ids": "\n"}, "delimiter_ids"),
    ({"algorithm": "AdaBlock", "delimiter_ids": [2**63]}, "delimiter_ids"),
    ({"algorithm": "AdaBlock", "delimiter_ids": [100_000]}, "delimiter_ids"),
    ({"algorithm": "LowConfidence"}, "dllm.algorithm"),
    ({"cache": "kv"}, "dllm.cache"),
    ({"cache": True}, "dllm.cache"),
    ({"cache": "dual", "algorithm": "Dream"}, "dllm.cache"),
    ({"cache": "delayed", "algorithm": "AdaBlock"}, "dllm.cache"),
    ({"cache": "dual", "algorithm": "LLaDA", "cfg_scale": 1.0}, "dllm.cache"),
    ({"cache": "vicinity", "prefix_look": -1}, "dllm.prefix_look"),
    ({"cache": "delayed", "refresh_interval": 0}, "dllm.refresh_interval"),
    ({"warmup": 2}, "dllm.warmup"),
]


def test_there_are_sixty_malformed_objects() -> None:
    assert len(MALFORMED) >= 60


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")


def ask(server: Server, question: str, dllm: dict[str, Any], **more: Any) -> Any:
    return client(server).chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        extra_body={"custom_params": {"dllm": dllm}},
        **more,
    )


@pytest.mark.parametrize(
    ("dllm", "names"), MALFORMED, ids=[str(i) for i in range(len(MALFORMED))]
)
def test_a_malformed_object_is_a_400(
    demo_server: Server, dllm: Any, names: str
) -> None:
    custom = {"custom_params": {"dllm": dllm}}
    chat = {"model": "demo", "messages": [{"role": "user", "content": "1 + 1?"}]}
    for stream in (False, True):
        for path, body in (
            ("/v1/chat/completions", {**chat, "max_tokens": 48, **custom}),
            (
                "/generate",
                {"text": "1 + 1", "sampling_params": {"max_new_tokens": 48, **custom}},
            ),
        ):
            response = demo_server.post(path, **body, stream=stream)
            assert response.status_code == 400, response.text
            assert names in response.text
            assert "expected" in response.text
    assert demo_server.generate([5], max_new_tokens=2)["meta_info"]["num_forwards"] > 0


def test_32_requests_of_eight_algorithms_and_two_temperatures(
    demo_server: Server,
) -> None:
    questions = [p.question for p in islice(problems(3, "heldout"), 32)]
    wanted = [
        (question, EIGHT[i % 8], {"temperature": (0.0, 0.7)[i // 8 % 2], "seed": i})
        for i, question in enumerate(questions)
    ]

    def answer(request: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
        question, dllm, sampling = request
        choice = ask(demo_server, question, dllm, **sampling).choices[0]
        return f"{choice.finish_reason}: {choice.message.content}"

    alone = [answer(request) for request in wanted]
    order = list(range(32))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(32) as pool:
        crowd = dict(
            zip(order, pool.map(answer, [wanted[i] for i in order]), strict=True)
        )
    assert [crowd[i] for i in range(32)] == alone
    assert len(set(alone)) > 16


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stream_is_the_answer(demo_server: Server, algorithm: str) -> None:
    question, dllm = "What is 12 + 30?", {"algorithm": algorithm}
    whole = ask(demo_server, question, dllm).choices[0]
    parts = [
        chunk.choices[0]
        for chunk in ask(demo_server, question, dllm, stream=True)
        if chunk.choices
    ]
    text = "".join(part.delta.content or "" for part in parts)
    assert text == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason


def test_the_effective_options_come_back(demo_server: Server) -> None:
    custom = {"dllm": {"algorithm": "LocalLeap", "radius": 2, "block_size": None}}
    meta = demo_server.generate([5], max_new_tokens=8, custom_params=custom)
    assert meta["meta_info"]["dllm"] == {
        "algorithm": "LocalLeap",
        "cache": "none",
        "length": "fixed",
        "max_forwards": None,
        "block_size": 32,
        "anchor_threshold": 0.9,
        "neighbor_threshold": 0.75,
        "radius": 2,
    }
    meta = demo_server.generate([5], max_new_tokens=8)["meta_info"]
    assert meta["dllm"]["algorithm"] == "FullAttnMultiBlock"
    assert meta["max_forwards_reached"] is False


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_max_forwards_ends_a_request_honestly(
    demo_server: Server, algorithm: str
) -> None:
    prompt = demo_server.post("/tokenize", prompt="What is 12 + 30?").json()["tokens"]
    custom = {"dllm": {"algorithm": algorithm, "max_forwards": 2}}
    answer = demo_server.generate(
        prompt, max_new_tokens=40, ignore_eos=True, custom_params=custom
    )
    meta = answer["meta_info"]
    assert meta["num_forwards"] <= 2
    if algorithm in ("LLaDA", "Dream", "AdaptiveParallel"):
        assert meta["max_forwards_reached"] is True
    assert meta["completion_tokens"] == meta["num_committed_tokens"] == 40
    assert meta["finish_reason"]["type"] == "length"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (
            "/v1/messages",
            {"max_tokens": 8, "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/v1/responses", {"max_output_tokens": 8, "input": "a"}),
    ],
)
def test_routes_that_would_drop_it_refuse_it(
    demo_server: Server, path: str, asked: dict[str, Any]
) -> None:
    custom = {"dllm": {"algorithm": "LLaDA"}}
    response = demo_server.post(path, model="demo", custom_params=custom, **asked)
    assert response.status_code == 400
    assert "custom_params" in response.text


def test_the_turn_end_is_held_back_on_request(demo_server: Server) -> None:
    """The demo model is sure of its turn end, so that holding it back shows."""
    question = "Tom has 23 apples. He buys 15 more. How many apples does Tom have?"
    steps = {"algorithm": "LLaDA", "max_forwards": 3}
    plain = ask(demo_server, question, steps).choices[0].message.content
    late = {**steps, "confidence_eos_eot_inf": True}
    assert ask(demo_server, question, late).choices[0].message.content != plain


def test_a_third_party_adds_an_algorithm_and_seeds_outlive_a_restart(
    start_server: Callable[..., Server], demo_server: Server
) -> None:
    path = os.pathsep.join([str(THIRD_PARTY), os.environ.get("PYTHONPATH", "")])
    server = start_server(
        DEMO,
        *("--dllm-algorithm", "LeftToRight", "--served-model-name", "demo"),
        env={"PYTHONPATH": path},
    )
    answer = server.generate([5], max_new_tokens=12, ignore_eos=True)["meta_info"]
    assert answer["dllm"] == {
        "algorithm": "LeftToRight",
        "cache": "none",
        "length": "fixed",
        "max_forwards": None,
        "width": 1,
    }
    assert answer["num_forwards"] == 12
    custom = {"dllm": {"width": 5}}
    wide = server.generate(
        [5], max_new_tokens=12, ignore_eos=True, custom_params=custom
    )
    assert wide["meta_info"]["num_forwards"] == 3
    refused = server.post(
        "/generate",
        input_ids=[5],
        sampling_params={"custom_params": {"dllm": {"width": 0}}},
    )
    assert refused.status_code == 400
    assert "width=0 is not allowed; expected an integer, 1 to 64" in refused.text
    for dllm in EIGHT:
        sampled = {
            "max_new_tokens": 24,
            "temperature": 0.8,
            "sampling_seed": 11,
            "custom_params": {"dllm": dllm},
        }
        fresh, old = (s.generate([5, 6], **sampled) for s in (server, demo_server))
        assert fresh["output_ids"] == old["output_ids"], dllm
    assert "NoSuchClass" in server.log.read_text()
    for where in ("begin", "next_step", "later_step", "decide", "on_commit", "shape"):
        broken = {"dllm": {"algorithm": "Faulty", "where": where}}
        whole = {"max_new_tokens": 9, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            sound = pool.submit(server.generate, [5], **whole)
            failed = pool.submit(
                server.post,
                "/generate",
                input_ids=[5],
                sampling_params=whole | {"custom_params": broken},
            )
            assert failed.result().status_code == 500, where
            assert where in failed.result().text
            assert sound.result()["meta_info"]["num_forwards"] == 9
    server.wait_until_idle()
    server.stop()
