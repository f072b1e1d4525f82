"""``GET /dllm/state``: the canvases that are being decoded, with their progress."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sglang_dllm.serving.request_ids import client_id
from sglang_dllm.serving.routes import STATE

if TYPE_CHECKING:
    from sglang_dllm.serving.request_checks import RequestChecks

PATIENCE = 1.5
"""Seconds that schedulers have for their answer. They give it between two rounds."""


def state_route(checks: RequestChecks) -> Route:
    """The route. Each data-parallel rank is asked once.

    A scheduler that does not answer within ``PATIENCE`` is status 503.
    """
    asked: asyncio.Task[list[dict[str, Any]]] | None = None

    async def answer(_: Request) -> JSONResponse:
        # One question at a time, which is never taken back: SGLang would take the late
        # answer to it for that of the next one, and the questions would pile up.
        nonlocal asked
        if asked is None or asked.done():
            asked = asyncio.ensure_future(checks.manager.get_internal_state())
        question = asked
        await asyncio.wait([question], timeout=PATIENCE)
        if not question.done():
            late = f"the schedulers have not answered within {PATIENCE} seconds"
            raise HTTPException(503, late)
        headers = {"Cache-Control": "no-store"}
        ranks = [x["dllm"] for x in question.result()]
        return JSONResponse(merged(ranks), headers=headers)

    return Route(STATE, answer, methods=["GET"])


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a server from those of its data-parallel ranks, in any order."""
    ranks = sorted(ranks, key=lambda rank: rank["dp_rank"])
    return {
        "queued": sum(rank["queued"] for rank in ranks),
        "canvases": [
            {
                **canvas,
                "request_id": client_id(canvas["request_id"]),
                "dp_rank": rank["dp_rank"],
            }
            for rank in ranks
            for canvas in rank["canvases"]
        ],
    }
