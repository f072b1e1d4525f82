"""Facts of the machine: names and versions, copy bandwidth, matrix rate."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu.roofline import Rates, median_of

WARM_UPS, RUNS = 5, 15

PACKAGES = ("torch", "sglang", "flashinfer-python", "triton", "transformers")

_FLUSH_BYTES = 2**30
"""Size of a write before each timed call. It empties every cache of the chip, and it
takes long enough for the host to launch the call before the device begins it."""


def describe() -> dict[str, Any]:
    """Names and versions. A value is None if the machine does not tell it."""
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": _processor(),
        "commit": _line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        **{name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **_driver(),
        }
    return facts


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read plus written."""
    size = 2**31 if device == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device) * 1e3


def matrix_rate(device: str) -> float:
    """Floating point operations a second of one large square product.

    The product is in bf16 on a GPU and in float32 on a CPU.
    """
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / timed(lambda: torch.mm(a, b, out=out), device) * 1e3


def measure_rates(device: str) -> Rates:
    return Rates(copy_bandwidth(device), matrix_rate(device))


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call, the median of ``RUNS`` after ``WARM_UPS``.

    On a GPU the time is between two events on the stream, with cold caches.
    """
    if device != "cuda":
        return median_of([_wall_ms(call) for _ in range(WARM_UPS + RUNS)][WARM_UPS:])
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(WARM_UPS + RUNS):
        flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return median_of([began.elapsed_time(end) for began, end in events[WARM_UPS:]])


def _wall_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _driver() -> dict[str, str]:
    query = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    fields = f"--query-gpu={','.join(query)}"
    line = _line("nvidia-smi", fields, "--format=csv,noheader") or ""
    return dict(zip(query, map(str.strip, line.split(",")), strict=False))


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _line(*command: str) -> str | None:
    """The first line of a command's output, or None if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None
