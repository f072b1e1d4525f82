"""--skip-tokenizer-init, as frameworks for reinforcement learning launch a server.

The server has other flags that change how requests are read: it sends its streams as
increments, every 8 tokens at least, it shortens what is too long, and it is behind a
proxy's path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer

from helpers.serving_harness import Server
from sglang_dllm.demo import demo_path

PROMPT = [72, 101, 108, 108, 111]
INTERVAL = 8
ONE_BY_ONE = {"dllm": {"algorithm": "EntropyThreshold", "threshold": 0}}


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(
        demo_path(),
        *("--dllm-algorithm", "FullAttnMultiBlock", "--skip-tokenizer-init"),
        *("--stream-interval", str(INTERVAL), "--incremental-streaming-output"),
        *("--allow-auto-truncate", "--fastapi-root-path", "/dllm"),
    )


def test_ids_are_answered_as_a_server_with_a_tokenizer_answers(
    server: Server, demo_server: Server
) -> None:
    for params in (
        {"max_new_tokens": 40},
        {"max_new_tokens": 40, "stop_token_ids": [297]},
        {"max_new_tokens": 40, "custom_params": {"dllm": {"algorithm": "AdaBlock"}}},
        {"n": 2, "temperature": 1.0, "sampling_seed": 3, "max_new_tokens": 24},
    ):
        body: dict[str, Any] = {"input_ids": PROMPT, "sampling_params": params}
        ours = server.post("/generate", **body).json()
        theirs = demo_server.post("/generate", **body).json()
        if isinstance(ours, dict):
            ours, theirs = [ours], [theirs]
        assert [x["output_ids"] for x in ours] == [x["output_ids"] for x in theirs]
        assert "text" not in ours[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/generate", {"text": "a"}, "text='a'"),
        (
            "/generate",
            {"input_ids": PROMPT, "sampling_params": {"stop": ["a"]}},
            "sampling_params.stop=['a']",
        ),
        (
            "/v1/chat/completions",
            {"model": "x", "messages": [{"role": "user", "content": "a"}]},
            "/generate with input_ids",
        ),
        ("/v1/completions", {"model": "x", "prompt": PROMPT}, "input_ids"),
        ("/v1/responses", {"model": "x", "input": "a"}, "input_ids"),
        ("/tokenize", {"prompt": "a"}, "input_ids"),
        (
            "/api/chat",
            {"model": "x", "messages": [{"role": "user", "content": "a"}]},
            "input_ids",
        ),
    ],
)
def test_text_is_refused(
    server: Server, path: str, body: dict[str, Any], named: str, stream: bool
) -> None:
    response = server.post(path, **body, stream=stream)
    assert response.status_code == 400, response.text
    assert named in response.text and "--skip-tokenizer-init" in response.text


@pytest.mark.parametrize(
    ("prompt_len", "asked", "answer_len"), [(3000, 64, 64), (5, 5000, 1016)]
)
def test_what_is_too_long_is_shortened(
    server: Server, prompt_len: int, asked: int, answer_len: int
) -> None:
    meta = server.generate([5] * prompt_len, max_new_tokens=asked)["meta_info"]
    assert abs(meta["canvas_len"] - meta["prompt_tokens"] - answer_len) <= 1
    assert meta["canvas_len"] > 1000


def test_increments_are_whole_and_each_has_the_counts(server: Server) -> None:
    params = {"max_new_tokens": 64, "ignore_eos": True, "custom_params": ONE_BY_ONE}
    body = {"input_ids": PROMPT, "sampling_params": params}
    chunks = server.events("/generate", **body)
    ids = [token for chunk in chunks for token in chunk["output_ids"]]
    assert ids == server.post("/generate", **body).json()["output_ids"]
    assert len(chunks) > 2
    for chunk in chunks:
        meta = chunk["meta_info"]
        assert meta["num_forwards"] > 0 and meta["canvas_len"] == len(PROMPT) + 64
    assert all(len(chunk["output_ids"]) >= INTERVAL for chunk in chunks[1:-1])
    assert chunks[-1]["meta_info"]["num_forwards"] == 64


def test_drafts_come_as_increments_without_text(server: Server) -> None:
    """No part repeats the steps of another, and all together are the trace."""
    watch = {"dllm": {**ONE_BY_ONE["dllm"], "stream": "draft", "trace": True}}
    params = {"max_new_tokens": 40, "ignore_eos": True, "custom_params": watch}
    chunks = server.events("/generate", input_ids=PROMPT, sampling_params=params)
    metas = [chunk["meta_info"] for chunk in chunks]
    steps = [step for meta in metas for step in meta["dllm"]["draft"]["steps"]]
    assert [step["forward"] for step in steps] == list(range(1, 41))
    assert {one[2] for step in steps for one in step["committed"]} == {None}
    assert metas[-1]["dllm"]["trace"]["steps"] == steps
    assert len(metas) > 40 / INTERVAL, "a draft is due before as many tokens are there"


def test_the_page_is_behind_the_proxy_s_path(server: Server) -> None:
    """The path of this server is the page's own, the hardest one there is."""
    for path in ("/dllm", "/dllm/dllm"):
        assert "<!doctype html>" in requests.get(server.base_url + path).text
        found = requests.get(f"{server.base_url}{path}/algorithms")
        assert found.json()["has_chat_template"] is False


def test_facts_come_from_the_tokenizer_s_files(server: Server) -> None:
    """AdaBlock needs the id of a newline, which no flag names."""
    newline = AutoTokenizer.from_pretrained(demo_path()).encode("\n")
    answer = server.generate(
        PROMPT, custom_params={"dllm": {"algorithm": "AdaBlock"}}, max_new_tokens=8
    )
    assert answer["meta_info"]["dllm"]["delimiter_ids"] == newline
