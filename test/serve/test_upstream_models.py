"""With the package installed, SGLang's own models answer as they do without it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.serving_harness import Server
from helpers.tiny_checkpoints import write_llada
from helpers.warm_start import run_python

ONLY_THE_PLATFORM = {"SGLANG_PLUGINS": "sglang_dllm_cpu"}
"""Loads our CPU platform, which SGLang cannot run here without, and no hook."""

SDAR_VOCAB_SIZE = 151_680
"""SGLang's table gives SDAR the mask id 151669."""

PROMPTS: list[list[int]] = [
    [65],
    [72, 101, 108, 108, 111],
    list(range(32, 64)),
    [7, 7, 7, 250, 9],
    list(range(120, 87, -1)),
    [66, 67] * 20,
]
LENGTHS = [1, 7, 24, 33, 16, 40]


def write_llama(path: Path) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=259,
    )
    return _save(LlamaForCausalLM(config), path)


def write_sdar(path: Path) -> Path:
    """SDAR is Qwen3's module tree with another mask; no AutoConfig knows its type."""
    torch.manual_seed(4)
    config = Qwen3Config(
        vocab_size=SDAR_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=259,
        tie_word_embeddings=False,
    )
    path = _save(Qwen3ForCausalLM(config), path)
    file = path / "config.json"
    file.write_text(file.read_text().replace("Qwen3ForCausalLM", "SDARForCausalLM"))
    return path


def _save(model: torch.nn.Module, path: Path) -> Path:
    donor = write_llada(path / "tokenizer")
    model.save_pretrained(path)
    for file in donor.glob("*token*.json"):
        shutil.copy(file, path)
    return path


MODELS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "autoregressive-llama": (write_llama, ()),
    # With a radix cache SGLang pages by blocks, and its page allocator is a Triton
    # kernel, which no CPU runs.
    "block-diffusion-sdar": (
        write_sdar,
        ("--dllm-algorithm", "LowConfidence", "--disable-radix-cache"),
    ),
}


def ask_one_by_one_and_together(server: Server) -> list[tuple[list[int], str]]:
    """Output ids and finish reason: each prompt alone, as a batch, as a crowd."""
    together = server.post(
        "/generate",
        input_ids=PROMPTS,
        sampling_params=[_greedy(length) for length in LENGTHS],
    ).json()
    crowd: dict[int, Any] = {}

    def ask(i: int) -> None:
        crowd[i] = server.generate(PROMPTS[i], **_greedy(LENGTHS[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [
        server.generate(prompt, **_greedy(length))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    return [
        (answer["output_ids"], answer["meta_info"]["finish_reason"]["type"])
        for answer in [*alone, *together, *(crowd[i] for i in range(len(PROMPTS)))]
    ]


def _greedy(length: int) -> dict[str, Any]:
    return {"max_new_tokens": length, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    write, flags = MODELS[request.param]
    path = write(tmp_path_factory.mktemp("upstream") / "model")
    yield path, flags
    shutil.rmtree(path)


_HOOKED = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.dllm.config import DllmConfig
print(hasattr(DllmConfig.from_server_args, "__wrapped__"))
"""


@pytest.mark.parametrize("env", [ONLY_THE_PLATFORM, {}], ids=["without", "with"])
def test_the_environment_variable_decides_whether_hooks_load(
    env: dict[str, str],
) -> None:
    """The comparison below rests on it: one side has hooks, the other none."""
    out = run_python(["-c", _HOOKED], 200, env).stdout
    assert out.split()[-1] == str(not env)


def test_same_tokens_with_and_without_our_plugin(
    model: tuple[Path, tuple[str, ...]], start_server: Callable[..., Server]
) -> None:
    path, flags = model
    answers = []
    for env in (ONLY_THE_PLATFORM, {}):
        server = start_server(path, *flags, env=env)
        answers.append(ask_one_by_one_and_together(server))
        log = server.log.read_text()
        server.stop()
        assert "Traceback" not in log
    without, with_plugin = answers
    lengths = [len(ids) for ids, _ in without]
    assert lengths == LENGTHS * 3, "the models decode to the full length"
    assert len({tuple(ids) for ids, _ in without}) > len(PROMPTS) // 2
    assert with_plugin == without
