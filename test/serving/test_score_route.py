"""The route /v1/score over a manager that answers at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from sglang_dllm.serving.request_ids import RequestIds
from sglang_dllm.serving.score_route import PATH, score_route


class Manager:
    """A tokenizer manager, whose requests have their ids while they are in flight."""

    tokenizer: Any = "not asked"
    served_model_name = "demo"

    def __init__(self) -> None:
        self.ids = RequestIds()
        self.methods: list[str | None] = []

    async def generate_request(
        self, obj: Any, request: Any
    ) -> AsyncIterator[list[dict[str, Any]]]:
        scores = [one["custom_params"]["dllm"]["score"] for one in obj.sampling_params]
        self.methods.append(scores[0]["method"])
        score = {
            "log_likelihood": -1.5,
            "token_log_likelihoods": [-1.5],
            "is_greedy": True,
        }
        with self.ids.replaced(obj):
            yield [{"meta_info": {"score": score, "num_forwards": 2}} for _ in scores]


def test_two_questions_of_one_request_have_its_id() -> None:
    """The second begins when the first has given its id back."""
    manager = Manager()
    checks: Any = SimpleNamespace(
        manager=manager, ids=manager.ids, model=SimpleNamespace(vocab_size=100)
    )
    client = TestClient(Starlette(routes=[score_route(checks)]))
    body = {"query": [1, 2], "items": [[3], [4]], "rid": "mine", "is_greedy": True}
    for _ in range(2):
        answer = client.post(PATH, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["scores"] == [-1.5, -1.5]
        assert answer.json()["is_greedy"] == [True, True]
        assert answer.json()["num_forwards"] == [4, 4]
    assert manager.methods == [None, "greedy"] * 2
