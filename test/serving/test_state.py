"""GET /dllm/state: the states of ranks in one answer, behind the key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from sglang_dllm.serving.state import state_route


def canvas(rid: str) -> dict[str, Any]:
    return {"request_id": rid, "num_forwards": 3}


async def internal_state() -> list[dict[str, Any]]:
    first = {"queued": 1, "canvases": [canvas(f"{'0' * 32}-mine")]}
    second = {"queued": 2, "canvases": [canvas("a" * 32)]}
    return [{"tp_size": 1, "dllm": first}, {"tp_size": 1, "dllm": second}]


def test_each_rank_is_asked_and_the_key_too() -> None:
    app = FastAPI()
    manager = SimpleNamespace(get_internal_state=internal_state)
    checks: Any = SimpleNamespace(manager=manager)
    app.router.routes.append(state_route(checks))
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app)
    assert client.get("/dllm/state").status_code == 401
    answer = client.get("/dllm/state", headers={"Authorization": "Bearer secret"})
    assert answer.json() == {
        "queued": 3,
        "canvases": [
            {"request_id": "mine", "num_forwards": 3, "dp_rank": 0},
            {"request_id": "a" * 32, "num_forwards": 3, "dp_rank": 1},
        ],
    }
