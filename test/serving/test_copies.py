"""n answers are n requests: their order, their seeds and their ids."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dllm.serving.copies import unfold_copies


def unfolded(**fields: Any) -> GenerateReqInput:
    obj = GenerateReqInput(**fields)
    unfold_copies(obj)
    obj.normalize_batch_and_arguments()
    return obj


def seeds(obj: GenerateReqInput) -> list[Any]:
    return [one.get("sampling_seed") for one in obj.sampling_params]


def test_one_answer_stays_as_it_is() -> None:
    obj = unfolded(text="a", rid="job", sampling_params={"sampling_seed": 7})
    assert obj.is_single and obj.text == "a" and obj.rid == "job"


def test_copies_of_one_prompt_count_their_seeds_and_ids() -> None:
    obj = unfolded(text="a", rid="job", sampling_params={"n": 3, "sampling_seed": 7})
    assert obj.parallel_sample_num == 1 and obj.text == ["a"] * 3
    assert seeds(obj) == [7, 8, 9]
    assert obj.rid == ["job_0", "job_1", "job_2"]


def test_copies_of_a_batch_keep_the_order_of_the_prompts() -> None:
    params: list[dict[str, Any]] = [{"n": 2, "sampling_seed": 7}, {"n": 2}]
    obj = unfolded(
        input_ids=[[1], [2]],
        rid=["x", "y"],
        extra_key=["k", "l"],
        sampling_params=params,
    )
    assert obj.input_ids == [[1], [1], [2], [2]]
    assert seeds(obj) == [7, 8, None, None]
    assert obj.rid == ["x_0", "x_1", "y_0", "y_1"]
    assert obj.extra_key == ["k", "k", "l", "l"]


@pytest.mark.parametrize(
    ("seed", "second"),
    [(2**63 - 1, -(2**63)), (-(2**63), -(2**63) + 1), (-1, 0), (0, 1)],
)
def test_seeds_stay_in_64_bits(seed: int, second: int) -> None:
    obj = unfolded(text="a", sampling_params={"n": 2, "sampling_seed": seed})
    assert seeds(obj) == [seed, second]
