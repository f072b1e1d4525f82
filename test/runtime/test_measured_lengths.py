"""Rules that measure forwards, through admission, rounds, growth and emission."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.fake_scheduler import FakeScheduler, end_of
from helpers.toy_lengths import EndingModel, expected
from helpers.toy_model import EOS, Request

PROMPTS = [(1, 2), (3,), (4, 9, 1), (2, 2)]
BLOCKS = {"algorithm": "FastDLLM", "block_size": 8}
RULES: dict[str, dict[str, Any]] = {
    "rho_eos": {"initial_length": 16, "eos_check_tokens": 8, "length_step": 3},
    "daedal": {
        "initial_length": 8,
        "eos_check_tokens": 8,
        "length_step": 3,
        "insert_confidence": 0.4,
    },
}


class SureEnd(EndingModel):
    """No EOS before the end of the text, and no doubt of those behind it."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(ids)
        behind = torch.arange(len(ids)) >= self.text_end
        logits[:, EOS] = torch.where(behind, 40.0, -40.0)
        return logits


def scheduler_of(model: EndingModel, **others: Any) -> FakeScheduler:
    scheduler = FakeScheduler(**others)
    scheduler.toy.model.model = model
    return scheduler


def reference(
    model: EndingModel, index: int, cap: int, options: dict[str, Any], ignore_eos: bool
) -> tuple[list[int], int]:
    """The tokens that are handed out, and the forwards."""
    own = {key: value for key, value in options.items() if key != "algorithm"}
    request = Request(
        model, PROMPTS[index % 4], cap, "FastDLLM", own, ignore_eos=ignore_eos
    )
    found = expected("llada", request)
    ids = found.ids
    if not ignore_eos and EOS in ids:
        ids = ids[: ids.index(EOS)]
    return ids, found.nfe


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    "others",
    [{}, {"steps_per_round": 4}, {"prelaunch": True}, {"slots": 52}, {"slots": 90}],
    ids=str,
)
def test_equals_the_reference(rule: str, others: dict[str, Any]) -> None:
    for seed in range(3):
        model = EndingModel(seed, (4, 20, 35)[seed % 3])
        scheduler = scheduler_of(model, **others)
        before, ignore_eos = scheduler.free_slots, seed % 2 == 0
        options = {**BLOCKS, "length": rule, **RULES[rule]}
        caps = (30, 40, 12, 45)
        reqs = [
            scheduler.queue(
                str(i), cap, PROMPTS[i], dllm=options, ignore_eos=ignore_eos
            )
            for i, cap in enumerate(caps)
        ]
        canvases: dict[int, Any] = {}
        for _ in range(400):
            for index, req in enumerate(reqs):
                if req.dllm_algo_state is not None:
                    canvases[index] = req.dllm_algo_state.canvas
            if not scheduler.running_batch.reqs and not scheduler.waiting_queue:
                break
            scheduler.loop()
        for index, req in enumerate(reqs):
            wanted = reference(model, index, caps[index], options, ignore_eos)
            found = list(req.output_ids), canvases[index].num_forwards
            assert found == wanted, (seed, index)
            end = "length" if len(wanted[0]) == caps[index] else "stop"
            assert end_of(req)[0] == end
        assert scheduler.free_slots == before


def test_a_stream_gets_no_token_that_is_taken_back() -> None:
    """The prefix is committed first, and the answer shrinks into it afterwards."""
    shrunk = 0
    for seed in range(12):
        model = EndingModel(seed, 9)
        options = {**BLOCKS, "length": "rho_eos", "initial_length": 24}
        options |= {"eos_check_tokens": 16, "length_step": 2}
        scheduler = scheduler_of(model)
        req = scheduler.queue("a", 60, PROMPTS[0], dllm=options)
        most = 0
        while not req.finished():
            scheduler.loop()
            canvas = req.dllm_algo_state and req.dllm_algo_state.canvas
            if canvas is not None:
                masked = canvas.masked[canvas.answer_start :]
                most = max(most, int(masked.argmax()) if masked.any() else len(masked))
        wanted, _ = reference(model, 0, 60, options, ignore_eos=True)
        assert list(req.output_ids) == wanted
        shrunk += most > len(wanted)
    assert shrunk


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_may_shrink_to_nothing(ignore_eos: bool) -> None:
    model = EndingModel(1, 0, sharp=0)
    options = {**BLOCKS, "length": "rho_eos", "initial_length": 16}
    options |= {"eos_check_tokens": 8}
    scheduler = scheduler_of(model)
    before = scheduler.free_slots
    req = scheduler.queue("a", 60, PROMPTS[0], dllm=options, ignore_eos=ignore_eos)
    scheduler.loop_to_end()
    assert list(req.output_ids) == []
    assert end_of(req)[0] == "stop"
    assert scheduler.free_slots == before


def test_a_hundred_large_caps_run_at_once() -> None:
    """The pool holds a hundred canvases of 128, and the caps are 4,096."""
    prompt = tuple(range(10)) * 6
    model = SureEnd(1, 120)
    scheduler = scheduler_of(
        model,
        slots=100 * 128,
        max_running_requests=100,
        max_prefill_tokens=100 * 128,
        context_len=5000,
    )
    before = scheduler.free_slots
    options = {"algorithm": "FastDLLM", "threshold": 0.5, "length": "append"}
    reqs = [
        scheduler.queue(str(i), 4096, (i % 10, *prompt[1:]), dllm=options,
                        ignore_eos=False)
        for i in range(100)
    ]  # fmt: skip
    most = 0
    while scheduler.running_batch.reqs or scheduler.waiting_queue:
        scheduler.loop()
        assert not scheduler.waiting_queue
        most = max(most, before[0] - scheduler.free_slots[0])
    assert 100 * 100 < most <= 100 * 128
    assert {end_of(req)[0] for req in reqs} == {"stop"}
    assert {len(req.output_ids) for req in reqs} == {60}
    assert scheduler.free_slots == before
