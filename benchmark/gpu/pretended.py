"""A launch on a pretended GPU: all declared CUDA graphs are captured before "ready".

    python -m benchmark.gpu.pretended --simcuda DIR [--attention-backend NAME]

The folder has a ``sitecustomize.py`` that pretends CUDA in every process: tensors of
the device are on the CPU, and kernels and captures do nothing. So no computed value
means anything. What the launch shows is that all Python code around the kernels holds
together, and in which order things happen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmark.server import Server
from sglang_dllm.demo import demo_path

READY = "The server is fired up and ready to roll!"

BACKENDS = ("flashinfer", "triton")

FLAGS = (
    *("--dllm-algorithm", "FullAttnMultiBlock", "--device", "cuda"),
    # The warm-up's request would decode what kernels that do nothing leave behind.
    *("--dtype", "bfloat16", "--skip-server-warmup"),
    *("--max-total-tokens", "4096"),
)


def environment(simcuda: Path, folder: Path) -> dict[str, str]:
    """The variables that pretend CUDA.

    Args:
        folder: gets a ``libcuda.so.1``, which SGLang's kernels are linked with.
    """
    stub, library = simcuda / "libcuda_stub.c", folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(stub)]
    subprocess.run(command, check=True)
    return {
        "SIM": "1",
        "PYTHONPATH": str(simcuda),
        "LD_LIBRARY_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
        # DeepGEMM would ask the real driver. No model here needs it.
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        "SGLANG_DEEPGEMM_PDL": "0",
    }


def launch(simcuda: Path, backend: str, seconds: float, flags: Sequence[str]) -> str:
    """Start a server, wait for it, and stop it.

    Returns:
        Its log, up to and with the line that says it is ready.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = environment(simcuda, folder)
        args = [*FLAGS, "--attention-backend", backend, *flags]
        server = Server(demo_path(), args, folder / "log", env)
        stack.callback(server.stop)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            log = server.log.read_text(errors="replace")
            if READY in log:
                return log[: log.index(READY) + len(READY)]
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{server.tail()}")
            time.sleep(1)
        raise RuntimeError(f"the server was not ready in time:\n{server.tail()}")


def told(log: str) -> list[str]:
    """What a log says of graphs, and that the server is ready, in its order."""
    parts = ("CUDA graph", READY)
    return [line for line in log.splitlines() if any(part in line for part in parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu.pretended")
    parser.add_argument("--simcuda", type=Path, required=True)
    parser.add_argument("--attention-backend", choices=BACKENDS)
    parser.add_argument("--seconds", type=float, default=600, help="for a launch")
    parser.add_argument("--server-arg", action="append", default=[])
    args = parser.parse_args(arguments)
    chosen = [args.attention_backend] if args.attention_backend else BACKENDS
    for backend in chosen:
        began = time.monotonic()
        log = launch(args.simcuda, backend, args.seconds, args.server_arg)
        lines = told(log)
        print(f"--- {backend}: ready after {time.monotonic() - began:.0f} s")
        print("\n".join(lines))
        if not any("captured in" in line for line in lines[:-1]):
            print("no graph is captured before the server is ready", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
