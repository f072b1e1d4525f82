"""Time outside the model's kernels, from torch.profiler's traces of the scheduler.

SGLang's ``/start_profile`` records the scheduler's process with its Python calls. A
kernel is the model's if a function of ``sglang_dllm/models/`` or a CUDA graph launched
it. The rest of a step is other kernels (decoding) and gaps. The profiler slows the host
but no kernel, so the traces give the kernels and runs without it give the step's time.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.gpu.shapes import ROUND, Case
from benchmark.gpu.steps import Requests, StepError

_MODEL = re.compile(r"sglang_dllm/models/\w+\.py\(")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]


@dataclass(frozen=True)
class Totals:
    """Microseconds by kernel name: the model's, and all others."""

    model: dict[str, float]
    other: dict[str, float]


def read_trace(file: Path) -> list[Event]:
    """The events of a Chrome trace that have a duration."""
    with gzip.open(file, "rt", encoding="utf-8") as trace:
        events = json.load(trace)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def totals(events: Sequence[Event]) -> Totals:
    """The time of each kernel, the model's and the others'.

    Raises:
        StepError: the trace has no function of a model, or no kernel of one.
    """
    calls = [e for e in events if e.get("cat") == "python_function"]
    spans = merged((e["ts"], e["ts"] + e["dur"]) for e in calls if _is_model(e))
    if not spans:
        raise StepError("the trace has no call of a function in sglang_dllm/models/")
    starts = [start for start, _ in spans]
    found = Totals(defaultdict(float), defaultdict(float))
    for name, launched, micros, is_graph in launches(events):
        at = bisect_right(starts, launched) - 1
        is_model = is_graph or (at >= 0 and launched <= spans[at][1])
        whose = found.model if is_model else found.other
        whose[name] += micros
    if not found.model:
        raise StepError("the trace has no kernel of the model")
    return found


def _is_model(event: Event) -> bool:
    return _MODEL.search(event["name"].replace("\\", "/")) is not None


def launches(events: Sequence[Event]) -> list[tuple[str, float, float, bool]]:
    """Each kernel's name, time of launch, microseconds, and if a graph launched it.

    A CUDA graph holds nothing but the model.
    """
    by = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") not in _ON_DEVICE:
            continue
        launch = by.get(event.get("args", {}).get("correlation"))
        # A kernel without a launch in the trace counts as outside of the model.
        launched = -1.0 if launch is None else launch["ts"]
        is_graph = launch is not None and "GraphLaunch" in launch["name"]
        found.append((event["name"], launched, event["dur"], is_graph))
    return found


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans, in order and without overlaps."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def per_forward(
    short: Mapping[str, float], long: Mapping[str, float], extra: int
) -> dict[str, float]:
    """Milliseconds a forward of each kernel, in falling order."""
    more = {
        name: (long.get(name, 0.0) - short.get(name, 0.0)) / extra / 1e3
        for name in {**long, **short}
    }
    return dict(sorted(more.items(), key=lambda item: -item[1]))


def measure_outside(
    server: Requests, case: Case, step_ms: float, folder: Path
) -> dict[str, Any]:
    """One line of the table.

    Args:
        step_ms: the step's time, measured without the profiler.
        folder: the server writes its traces here.
    """
    short, longest = case.forwards
    long = min(longest, short + 2 * ROUND)
    found = []
    for index, forwards in enumerate((short, long)):
        name = f"{case.name.replace(' ', '-')}-{index}"
        profile = {
            "output_dir": str(folder),
            "profile_id": name,
            "activities": ["CPU", "GPU"],
            "with_stack": True,
            "record_shapes": False,
        }
        server.post("/start_profile", profile)
        server.run(case, forwards)
        server.post("/stop_profile", None)
        files = sorted(folder.glob(f"*{name}*.trace.json.gz"))
        if not files:
            raise StepError(f"{case.name}: the profiler wrote no trace")
        found.append(totals(read_trace(files[0])))
    model = per_forward(found[0].model, found[1].model, long - short)
    other = per_forward(found[0].other, found[1].other, long - short)
    return outside(case.name, step_ms, model, other)


def outside(
    name: str, step_ms: float, model: dict[str, float], other: dict[str, float]
) -> dict[str, Any]:
    """The parts of a step: the model's kernels, other kernels, and gaps."""
    model_ms, other_ms = sum(model.values()), sum(other.values())
    return {
        "name": name,
        "step_ms": step_ms,
        "model_kernels_ms": model_ms,
        "other_kernels_ms": other_ms,
        "gaps_ms": step_ms - model_ms - other_ms,
        "outside": 1 - model_ms / step_ms,
        "model_kernels": model,
        "other_kernels": other,
    }
