"""The log-probabilities of a request that was retracted in the middle."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req

from helpers.fake_scheduler import FakeScheduler


def ask(scheduler: FakeScheduler) -> Req:
    """A request for 8 tokens, one a forward, with two alternatives of each."""
    plain = scheduler.queue("asks", 8)
    scheduler.waiting_queue.remove(plain)
    req = Req(
        *("asks", "", plain.origin_input_ids, plain.sampling_params),
        return_logprob=True,
        top_logprobs_num=2,
    )
    req.logprob_start_len = -1
    scheduler.waiting_queue.append(req)
    return req


def found(req: Req) -> tuple[list[Any], ...]:
    kept: Any = req.logprob
    return (
        kept.output_token_logprobs_idx,
        kept.output_token_logprobs_val,
        kept.output_top_logprobs_idx,
        kept.output_top_logprobs_val,
    )


@pytest.mark.parametrize("prelaunch", [False, True])
@pytest.mark.parametrize("num_rounds", [1, 3, 6])
def test_a_retraction_loses_none_and_sends_none_twice(
    num_rounds: int, prelaunch: bool
) -> None:
    undisturbed = FakeScheduler()
    whole = ask(undisturbed)
    undisturbed.loop_to_end()
    scheduler = FakeScheduler(prelaunch=prelaunch)
    req = ask(scheduler)
    scheduler.loop(num_rounds)
    scheduler.retract_all()
    scheduler.loop_to_end()
    ids, values, top_ids, top_values = found(req)
    assert ids == list(req.output_ids) and len(ids) == 8
    assert all(value <= 0 for value in values)
    assert all(len(one) == 2 for one in (*top_ids, *top_values))
    assert list(req.output_ids) == list(whole.output_ids)
    assert found(req) == found(whole)
