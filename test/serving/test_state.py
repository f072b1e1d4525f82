"""GET /dllm/state: the states of ranks in one answer, behind the key and in time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from sglang_dllm.serving import state
from sglang_dllm.serving.state import state_route


def canvas(rid: str) -> dict[str, Any]:
    return {"request_id": rid, "num_forwards": 3}


async def internal_state() -> list[dict[str, Any]]:
    """The second rank is the faster one."""
    first = {"dp_rank": 0, "queued": 1, "canvases": [canvas(f"{'0' * 32}-mine")]}
    second = {"dp_rank": 1, "queued": 2, "canvases": [canvas("a" * 32)]}
    return [{"tp_size": 1, "dllm": second}, {"tp_size": 1, "dllm": first}]


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


def test_a_silent_scheduler_is_status_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, however many ask; and it is well once it answers."""
    monkeypatch.setattr(state, "PATIENCE", 0.05)
    num_asked = 0
    answers = asyncio.Event()

    async def silent() -> list[dict[str, Any]]:
        nonlocal num_asked
        num_asked += 1
        await answers.wait()
        return await internal_state()

    app = FastAPI()
    manager = SimpleNamespace(get_internal_state=silent)
    checks: Any = SimpleNamespace(manager=manager)
    app.router.routes.append(state_route(checks))
    with TestClient(app) as client:
        for _ in range(3):
            begin = time.monotonic()
            late = client.get("/dllm/state")
            assert late.status_code == 503 and time.monotonic() - begin < 5
            assert "have not answered within 0.05 seconds" in late.json()["detail"]
        assert num_asked == 1
        answers.set()
        assert client.get("/dllm/state").json()["queued"] == 3
