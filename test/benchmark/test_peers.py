"""The comparison of engines: its checkpoint, its plain loop and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmark import peers
from benchmark.peer.checkpoint import SPECIAL, write_checkpoint
from benchmark.peer.engines import ANSWER_LEN, PROMPT_LEN, STEPS, PlainLoop, prompts
from benchmark.speed.plain_loop import load

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "llada", TINY)


@pytest.fixture(scope="module")
def loop(checkpoint: Path) -> PlainLoop:
    return PlainLoop(str(checkpoint))


def test_every_prompt_has_the_stated_tokens(loop: PlainLoop) -> None:
    texts = prompts(8)
    assert len(set(texts)) == 8
    for text in texts:
        messages = [{"role": "user", "content": text}]
        rendered = loop.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = loop.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert len(ids) == PROMPT_LEN and ids[0] == SPECIAL["<|startoftext|>"]
    assert loop.tokenizer.mask_token_id == SPECIAL["<|mdm_mask|>"]


def test_the_code_of_the_checkpoint_is_the_architecture(
    checkpoint: Path, loop: PlainLoop
) -> None:
    """Every engine must compute the same model, or the comparison says nothing."""
    ids = torch.tensor([*range(20), SPECIAL["<|mdm_mask|>"]])
    wanted = load(str(checkpoint)).logits(ids)
    with torch.no_grad():
        found = loop.model.float()(ids[None]).logits[0]
    loop.model.bfloat16()
    assert (found - wanted).abs().max() < 1e-4


def test_the_plain_loop_takes_the_stated_steps(
    loop: PlainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    forward = loop.model.forward

    def noted(ids: torch.Tensor) -> object:
        masks.append(int((ids == SPECIAL["<|mdm_mask|>"]).sum()))
        return forward(ids)

    monkeypatch.setattr(loop.model, "forward", noted)
    assert loop.answer(prompts(1)) > 0
    assert masks[0] == ANSWER_LEN and len(masks) == STEPS
    assert masks[-1] == ANSWER_LEN // STEPS


def test_the_table_has_ratios_to_dlmserve_in_the_same_round() -> None:
    seconds = {
        1: {"ours": [2.0, 4.0, 2.0], "dlmserve": [4.0, 12.0, 2.0], "plain loop": [4.0]},
        8: {"ours": [10.0], "dlmserve": [20.0], "plain loop": []},
    }
    rows = {name: peers._row(name, seconds, 2**20) for name in seconds[1]}
    assert rows["ours"]["1"]["ratio"] == 2.0
    assert rows["ours"]["1"]["step_ms"] == 1000 * 2.0 / STEPS
    assert rows["ours"]["8"]["tokens_per_second"] == 8 * ANSWER_LEN / 10
    # One text after the other: 8 take 8 times as long.
    assert rows["plain loop"]["8"]["ratio"] == 20 / 32
    figures = {"rounds": 3, "busy_rounds": 1, "engines": rows}
    table = peers.markdown(figures)
    assert "torch " in table and "llama.cpp: not measured" in table
    figures["llama_cpp_step_ms"] = 250.0 * 256 / (88 + ANSWER_LEN)
    assert "ours is 2.00 times as fast" in peers.show(figures)
