"""Checks that this installation can serve, and advises on the first problem."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import SimpleNamespace
from typing import TextIO

from sglang_dllm import __version__
from sglang_dllm.config.launch_flags import DEFAULT_MAX_RUNNING_REQUESTS
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.runtime.graph_grid import GraphGrid
from sglang_dllm.upstream import versions


def report(out: TextIO) -> int:
    """Print the findings. Returns 0, or 1 after a line of advice."""
    advice = _check_versions(out) or _check_plugins(out) or _check_device(out)
    advice = advice or _check_hooks(out) or _check_demo(out)
    _show_graphs(out)
    if advice:
        print(f"advice      {advice}", file=out)
        return 1
    print("ok          ready to serve", file=out)
    return 0


def _line(out: TextIO, name: str, text: str) -> None:
    print(f"{name:<12}{text}", file=out)


def _check_versions(out: TextIO) -> str | None:
    found = {}
    for package in ("sglang", "torch", "transformers", "flashinfer-python", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    numbers = ", ".join(f"{name} {number}" for name, number in found.items())
    _line(out, "python", platform.python_version())
    _line(out, "versions", f"sglang-dllm {__version__}, {numbers}")
    if found["sglang"] == "missing":
        return f"pip install '{versions.REQUIREMENT}'"
    _line(out, "sglang", versions.describe(found["sglang"]))
    return None


def _check_plugins(out: TextIO) -> str | None:
    """Check that SGLang finds our entry points and does not filter them out."""
    for group, name in (
        ("sglang.srt.plugins", "sglang_dllm"),
        ("sglang.srt.platforms", "sglang_dllm_cpu"),
    ):
        if name not in entry_points(group=group).names:
            return f"entry point {name} is not installed: pip install sglang-dllm"
        allowed = os.environ.get("SGLANG_PLUGINS")
        if allowed and name not in allowed.replace(" ", "").split(","):
            return f"SGLANG_PLUGINS leaves {name} out: unset it or add the name"
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected and selected != "sglang_dllm_cpu":
        return f"SGLANG_PLATFORM={selected} drops our plugin: unset it"
    _line(out, "plugins", "sglang_dllm, sglang_dllm_cpu found")
    return None


def _check_device(out: TextIO) -> str | None:
    import torch

    from sglang_dllm.plugin import activate_platform

    if torch.cuda.is_available():
        names = {
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        }
        _line(out, "device", f"cuda: {torch.cuda.device_count()} x {', '.join(names)}")
        _line(out, "attention", "flashinfer (default), triton, torch_native")
    elif activate_platform() is not None:
        _line(out, "device", f"cpu: {torch.get_num_threads()} threads, float32")
        _line(out, "attention", "torch_native with full-attention SDPA")
    else:
        return "neither CUDA nor our CPU platform: unset SGLANG_USE_CPU_ENGINE"
    return None


def _check_hooks(out: TextIO) -> str | None:
    """Load the plugins as a server process does, and verify every hook."""
    noise = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            warnings.simplefilter("ignore")
            from sglang.srt.plugins import load_plugins

            load_plugins()
            from sglang_dllm.patches import HOOKS
    finally:
        logging.disable(logging.NOTSET)
    from sglang_dllm.errors import UpstreamContractError

    try:
        HOOKS.verify()
    except UpstreamContractError as error:
        return str(error)
    _line(out, "contract", "SGLang has all that sglang-dllm uses of it")
    _line(out, "hooks", f"{len(HOOKS.originals)} applied")
    from sglang.srt.dllm.algorithm import algo_name_to_cls
    from sglang.srt.models.registry import ModelRegistry

    from sglang_dllm.runtime.dllm_config import SGLANG_NAME

    missing = (set(FAMILIES) - set(ModelRegistry.models)) | (
        {SGLANG_NAME} - set(algo_name_to_cls)
    )
    if missing:
        return f"not registered with SGLang: {', '.join(sorted(missing))}"
    _line(out, "models", ", ".join(FAMILIES))
    _line(out, "algorithms", ", ".join(algorithms()))
    return None


def _show_graphs(out: TextIO) -> None:
    """The grid of CUDA graphs that the default flags declare, before the shift of a
    family. A server logs what it has captured."""
    import torch

    flags = SimpleNamespace(
        disable_decode_cuda_graph=False,
        cuda_graph_bs_decode=None,
        cuda_graph_max_bs_decode=None,
        max_running_requests=DEFAULT_MAX_RUNNING_REQUESTS,
    )
    family = FAMILIES["LLaDAModelLM"]
    grid = GraphGrid.declared(flags, family, block_size=None, max_canvas_len=4096)
    sizes: dict[int, list[str]] = {}
    for num_windows, length in sorted(grid.buckets):
        sizes.setdefault(length, []).append(str(num_windows))
    parts = [f"{'/'.join(nums)} x {length}" for length, nums in sorted(sizes.items())]
    where = "" if torch.cuda.is_available() else "none on this device; on a GPU "
    _line(out, "graphs", f"{where}windows x tokens {', '.join(parts)}")


def _check_demo(out: TextIO) -> str | None:
    from sglang_dllm.demo import demo_path

    folder = demo_path()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            return f"the demo checkpoint lacks {name}: reinstall sglang-dllm"
    _line(out, "demo", str(folder))
    return None
