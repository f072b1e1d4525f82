"""``GET /dllm/state``: the canvases that are being decoded, with their progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sglang_dllm.serving.request_ids import client_id
from sglang_dllm.serving.routes import STATE

if TYPE_CHECKING:
    from sglang_dllm.serving.request_checks import RequestChecks


def state_route(checks: RequestChecks) -> Route:
    """The route. Schedulers answer between two rounds, each data-parallel rank once."""

    async def answer(_: Request) -> JSONResponse:
        found = await checks.manager.get_internal_state()
        headers = {"Cache-Control": "no-store"}
        return JSONResponse(merged([x["dllm"] for x in found]), headers=headers)

    return Route(STATE, answer, methods=["GET"])


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a server from those of its data-parallel ranks, in their order."""
    return {
        "queued": sum(rank["queued"] for rank in ranks),
        "canvases": [
            {
                **canvas,
                "request_id": client_id(canvas["request_id"]),
                "dp_rank": index,
            }
            for index, rank in enumerate(ranks)
            for canvas in rank["canvases"]
        ],
    }
