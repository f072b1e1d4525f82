"""A server with a small paged pool, of a folder that asks for sampling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.serving_harness import Server
from reference.algorithms import run
from reference.models import load
from sglang_dllm.demo import demo_path

POOL = 896
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = (
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
SAMPLED = {"temperature": 1.5, "top_p": 0.95, "top_k": 50}


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """Its generation_config.json asks for sampling, and for a penalty as Qwen's do."""
    folder = _copy(tmp_path_factory)
    wanted = {**SAMPLED, "do_sample": True, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(wanted))
    return start_server(
        folder,
        *("--dllm-algorithm", "FullAttnMultiBlock", "--served-model-name", "demo"),
        *("--max-total-tokens", str(POOL), "--page-size", "16"),
        *("--max-prefill-tokens", "256", "--max-running-requests", "2"),
    )


def _copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "demo"
    return Path(shutil.copytree(demo_path(), folder))


def test_the_folders_sampling_is_every_routes(server: Server) -> None:
    """Each route answers as if the request had asked for it, and none is a 400."""
    length, seed = 48, 7

    def native(**params: Any) -> str:
        params |= {"max_new_tokens": length, "sampling_seed": seed}
        found = server.post("/generate", text=PROMPT, sampling_params=params)
        text: str = found.json()["text"]
        return text

    drawn = native()
    assert drawn == native(**SAMPLED) != native(temperature=0)
    body: dict[str, Any] = {"seed": seed, "max_tokens": length}
    completion = server.post("/v1/completions", prompt=PROMPT, **body).json()
    assert completion["choices"][0]["text"] == drawn

    def chat(**asked: Any) -> Any:
        body = {"messages": MESSAGES, "max_tokens": length, "seed": seed, **asked}
        return server.post("/v1/chat/completions", **body).json()["choices"][0]

    assert chat() == chat(**SAMPLED)

    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": length}
    assert server.post("/v1/messages", **asked).status_code == 200
    asked = {"model": "demo", "input": "Tom has 3.", "max_output_tokens": length}
    assert server.post("/v1/responses", **asked).status_code == 200
    asked = {"model": "demo", "messages": MESSAGES, "options": {"seed": seed}}
    assert server.post("/api/chat", stream=False, **asked).status_code == 200


def test_the_longest_canvas_of_a_small_paged_pool(server: Server) -> None:
    refused = server.post(
        "/generate", input_ids=[5] * 20, sampling_params={"max_new_tokens": 960}
    )
    found = re.search(r"can be 1 to (\d+)", refused.json()["error"]["message"])
    assert found is not None
    most = int(found[1])
    assert POOL - 76 <= most < POOL - 20
    answer = server.generate([5] * 20, max_new_tokens=most)
    assert answer["meta_info"]["canvas_len"] == 20 + most
    assert (
        server.post(
            "/generate",
            input_ids=[5] * 20,
            sampling_params={"max_new_tokens": most + 1},
        ).status_code
        == 400
    )
    server.wait_until_idle()


def test_guidance_on_a_canvas_longer_than_half_of_the_pool(server: Server) -> None:
    """Two windows are computed over the slots of one; the pool holds one canvas.

    SGLang's buffers for the inputs of a forward are as large as the pool. The
    scheduler ended where a forward had more tokens.
    """
    prompt, length = list(range(5, 25)), 696
    options = {"block_size": 64, "steps": 24, "cfg_scale": 1.0}
    expected = run("LLaDA", load(demo_path()), prompt, length, options)
    answer = server.generate(
        prompt,
        max_new_tokens=length,
        temperature=0,
        ignore_eos=True,
        skip_special_tokens=False,
        custom_params={"dllm": {"algorithm": "LLaDA", **options}},
    )
    assert answer["output_ids"] == expected.ids
    assert answer["meta_info"]["num_forwards"] == expected.nfe
    server.wait_until_idle()
