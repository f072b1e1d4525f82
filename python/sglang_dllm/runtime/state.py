"""The active canvases of a scheduler as plain values, for ``GET /dllm/state``."""

from __future__ import annotations

import time
from typing import Any

from sglang_dllm.upstream.compat import data_parallel_rank

STATE_KEY = "dllm"
"""The key in SGLang's internal state of a scheduler, which carries ours."""


def state_of(scheduler: Any) -> dict[str, Any]:
    """The canvases of a scheduler and the length of its queue, between two rounds."""
    now = time.monotonic()
    canvases = []
    for req in scheduler.running_batch.reqs:
        state = req.dllm_algo_state
        canvas = state.canvas
        gaps = ~canvas.fixed
        canvases.append(
            {
                "request_id": req.rid,
                "algorithm": canvas.algorithm,
                "cache": canvas.cache,
                "prompt_len": canvas.answer_start,
                "canvas_len": len(canvas),
                "to_decode": int(gaps.sum()),
                "committed": int((gaps & ~canvas.masked).sum()),
                "num_forwards": canvas.num_forwards,
                "window": list(canvas.window),
                "age_s": round(now - state.began, 3),
            }
        )
    return {
        # Answers of data-parallel ranks come in any order.
        "dp_rank": data_parallel_rank(scheduler),
        "queued": len(scheduler.waiting_queue),
        "canvases": canvases,
    }
