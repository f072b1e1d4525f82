"""Resolves the flags of many launches, each in a fork of one process.

SGLang takes 13 seconds to import. The forks share that, and each loads the plugins and
patches modules for itself. Reads a JSON list of launches from stdin, ``{"arguments",
"plugins", "change"}``, and prints a JSON list of what each did. A change is Python code
that runs first, to make the fork's SGLang another one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers.utils.hub as hub
from sglang.srt.plugins import load_plugins

import sglang_dllm.config.launch_flags as launch_flags
import sglang_dllm.runtime.dllm_config as dllm_config
from helpers.upstream_shapes import raw_args, resolve, resolve_first_step
from sglang_dllm.upstream.contract import Contract

FLAGS = ("trust_remote_code", "attention_backend", "mem_fraction_static")
FLAGS += ("cuda_graph_max_bs_decode", "disable_decode_cuda_graph", "tokenizer_path")
FLAGS += ("json_model_override_args", "max_total_tokens")


def noted(module: Any, name: str, note: Callable[..., None]) -> None:
    """Call ``note`` with the arguments of each call of ``module.name``."""
    original = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def probe(arguments: list[str]) -> dict[str, Any]:
    """Resolve one launch.

    Returns:
        ``ours``: the functions of ours that ran. ``reads``: the files that a hub was
        asked for. ``grown``: bytes by which the process grew. ``error``: the end of the
        launch. ``flags``: some of its flags, if it did not end.
    """
    ours: list[str] = []
    reads: list[Any] = []
    load_plugins()
    for module, name in (
        (launch_flags, "settle_launch_flags"),
        (dllm_config, "full_attn_config"),
        (dllm_config, "hf_config_of"),
    ):
        noted(module, name, lambda *args, name=name, **kwargs: ours.append(name))
    noted(
        hub,
        "hf_hub_download",
        lambda *args, **kwargs: reads.append(kwargs.get("filename", args[1:])),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error, flags = None, {}
    try:
        kind, *rest = arguments
        if kind == "early":
            resolve_first_step(raw_args(model_path=rest[0]))
        else:
            found = resolve(rest)
            flags = {name: getattr(found, name) for name in FLAGS}
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "ours": ours,
        "reads": reads,
        "grown": grown * 1024,
        "error": error,
        "flags": flags,
    }


def in_fork(asked: dict[str, Any]) -> dict[str, Any]:
    """``probe`` in a child process, with its own plugins and stderr."""
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            if asked["plugins"] is not None:
                os.environ["SGLANG_PLUGINS"] = asked["plugins"]
            exec(asked.get("change", ""), {})
            json.dump(probe(asked["arguments"]), answer)
            answer.flush()
            os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        errors.seek(0)
        stderr = errors.read()
        text = answer.read()
        assert text, stderr
        return {**json.loads(text), "stderr": stderr}


def run(
    launches: Iterable[dict[str, Any]], environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Start a process of this module and return what its launches did."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.launch_probe"],
        input=json.dumps(list(launches)),
        capture_output=True,
        text=True,
        timeout=400,
        env={
            **os.environ,
            **(environment or {}),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    for use in Contract.load().always:
        # The forks would import the same modules, each for itself.
        with contextlib.suppress(ImportError):
            importlib.import_module(use.partition(":")[0])
    print("\n" + json.dumps([in_fork(asked) for asked in json.load(sys.stdin)]))
