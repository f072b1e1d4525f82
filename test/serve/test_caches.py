"""Cached canvases through the server: answers, counters, crowds, retraction."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import requests
from conftest import DEMO
from transformers import AutoTokenizer

from helpers.serving_harness import Server
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.demo.problems import problems

LENGTH = 200


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in islice(problems(5, "heldout"), 6)
    ]


def ask(
    server: Server,
    prompt: list[int],
    cache: str,
    *,
    ignore_eos: bool = True,
    **dllm: Any,
) -> dict[str, Any]:
    return server.generate(
        prompt,
        max_new_tokens=LENGTH,
        temperature=0,
        ignore_eos=ignore_eos,
        custom_params={"dllm": {"cache": cache, "block_size": 16, **dllm}},
    )


def counters(server: Server) -> dict[str, float]:
    text = requests.get(f"{server.base_url}/metrics", timeout=30).text
    found = re.findall(r"^sglang:dllm_(\w+)_total\{.*\} (\S+)$", text, re.MULTILINE)
    total: Counter[str] = Counter()
    for name, value in found:
        # One series for each algorithm and cache.
        total[name] += float(value)
    return total


@pytest.mark.parametrize("cache", ALL_CACHES)
def test_meta_info_and_metrics_say_what_was_recomputed(
    demo_server: Server, prompts: list[list[int]], cache: str
) -> None:
    before = counters(demo_server)
    meta = ask(demo_server, prompts[0], cache, threshold=0.1)["meta_info"]
    canvas_len, forwards = len(prompts[0]) + LENGTH, meta["num_forwards"]
    assert meta["dllm"]["cache"] == cache
    assert meta["canvas_len"] == canvas_len
    assert meta["tokens_computed"] + meta["tokens_cached"] == canvas_len * forwards
    if cache == "none":
        assert meta["tokens_cached"] == meta["full_refreshes"] == 0
    else:
        assert 0 < meta["full_refreshes"] < forwards
        assert meta["tokens_cached"] > 0
    demo_server.wait_until_idle()
    after = counters(demo_server)
    for name, field in {
        "forwards": "num_forwards",
        "committed_tokens": "num_committed_tokens",
        "tokens_computed": "tokens_computed",
        "tokens_cached": "tokens_cached",
        "full_refreshes": "full_refreshes",
    }.items():
        assert after[name] - before[name] == meta[field], name


def test_a_window_recomputes_less_and_answers_alike(
    demo_server: Server, prompts: list[list[int]]
) -> None:
    """One token a forward: most of the forwards of a block are windows."""

    # Multi-block windows reach as far as its blocks do.
    one_token = {"algorithm": "EntropyThreshold", "threshold": 0}

    def answers(cache: str) -> list[dict[str, Any]]:
        return [
            ask(demo_server, prompt, cache, ignore_eos=False, **one_token)
            for prompt in prompts
        ]

    def rows(found: list[dict[str, Any]]) -> int:
        return sum(answer["meta_info"]["tokens_computed"] for answer in found)

    exact = answers("none")
    for cache in ("dual", "vicinity"):
        cached = answers(cache)
        same = [a["text"] == b["text"] for a, b in zip(exact, cached, strict=True)]
        assert sum(same) >= len(prompts) - 1, cache
        assert rows(cached) < rows(exact) / 2, cache


def test_a_crowd_of_caches_gives_each_what_it_gets_alone(
    demo_server: Server, prompts: list[list[int]]
) -> None:
    asks = [(prompt, cache) for cache in ALL_CACHES for prompt in prompts[:4]]
    algorithms = ("FullAttnMultiBlock", "FastDLLM", "LocalLeap", "Credit")

    def send(index: int) -> list[int]:
        prompt, cache = asks[index]
        algorithm = algorithms[index % len(algorithms)]
        ids: list[int] = ask(demo_server, prompt, cache, algorithm=algorithm)[
            "output_ids"
        ]
        return ids

    alone = [send(index) for index in range(len(asks))]
    with ThreadPoolExecutor(len(asks)) as pool:
        crowd = list(pool.map(send, range(len(asks))))
    assert crowd == alone
    demo_server.wait_until_idle()


def test_retraction_forgets_the_keys_and_values_of_a_canvas(
    demo_server: Server, prompts: list[list[int]]
) -> None:
    """A retracted canvas goes on with a forward over all of it, in other slots."""
    one_block_at_a_time = {"algorithm": "EntropyThreshold", "threshold": 0}
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(ask, demo_server, prompt, "dual", **one_block_at_a_time)
            for prompt in prompts[:4]
        ]
        time.sleep(1.0)
        assert demo_server.post("/pause_generation", mode="retract").ok
        time.sleep(0.5)
        finished = [future.done() for future in running]
        assert demo_server.post("/continue_generation").ok
        answers = [future.result() for future in running]
    assert not all(finished), "the pause came too late"
    num_blocks = -(-LENGTH // 16)
    for answer, was_done in zip(answers, finished, strict=True):
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == LENGTH
        assert meta["num_committed_tokens"] == LENGTH
        # One for each block, and one more for what the pause lost, unless that was
        # at a block's first forward.
        assert meta["full_refreshes"] in (
            (num_blocks,) if was_done else (num_blocks, num_blocks + 1)
        )
    demo_server.wait_until_idle()
