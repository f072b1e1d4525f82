"""The GPU benchmark: machine, parts alone, steps through the server, gaps.

run.sh calls it. sglang-dllm must be installed, so that ``sglang serve`` finds its
plugins. No network is needed, since the model has
random weights.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu import kernels, machine, steps, traces
from benchmark.gpu.report import Results, markdown
from benchmark.gpu.roofline import LLADA_8B, ModelShape, Rates
from benchmark.gpu.shapes import (
    DEFAULT_ALGORITHM,
    Case,
    Sizes,
    cpu_shape,
    cpu_sizes,
    gpu_shape,
    gpu_sizes,
    write_model,
)
from benchmark.server import Server

CASE_SECONDS = 15.0
"""The most that one case may take."""

PROFILE_SECONDS = 60.0
"""The time that is kept for the traces. They come last, because the profiler leaves the
server slower."""


ESTIMATED = re.compile(r"CUDA graphs take about (\d+) MiB")
CAPTURED = re.compile(
    r"CUDA graphs: (\d+) forwards and (\d+) steps captured "
    r"in ([\d.]+) s and (-?\d+) MiB"
)
"""What a server logs of its graphs (``runtime.graph_memory``, ``runtime.graphs``)."""


class Run:
    """One run: its device, its sizes, its results and its end."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
        self.device = device
        on_gpu = device == "cuda"
        sizes, shape = (gpu_sizes, gpu_shape) if on_gpu else (cpu_sizes, cpu_shape)
        self.sizes: Sizes = sizes(args.quick)
        self.shape: ModelShape = shape(args.layers, args.hidden)
        self.end = time.monotonic() + args.minutes * 60
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["benchmark/gpu/run.sh", *args.command]),
            "device": device,
            "shape": asdict(self.shape),
            "model": f"{self.shape.layers} layers of {self.shape.hidden}",
            "software": machine.describe(),
        }
        has_goals = on_gpu and self.shape == LLADA_8B
        self.results = Results(args.out, facts, has_goals)
        self.rates: Rates | None = None

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def attempt(self, name: str, part: Callable[[], None]) -> bool:
        """Run a part. A failure is noted, and the other parts still run."""
        if self.left() <= 0:
            self.skip(name, f"the {self.args.minutes:g} minutes are over")
            return False
        try:
            part()
            return True
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            self.results.add("errors", {"name": name, "reason": reason[:500]})
            return False

    def skip(self, name: str, reason: str) -> None:
        self.results.add("skipped", {"name": name, "reason": reason})

    def measure_machine(self) -> None:
        self.rates = rates = machine.measure_rates(self.device)
        for name, value, unit in [
            ("copy, read and written", rates.bandwidth / 1e9, "GB/s"),
            ("matrix product", rates.matrix_rate / 1e12, "TFLOP/s"),
        ]:
            row = {"name": name, "value": value, "unit": unit}
            self.results.add("machine", row)

    def measure_parts(self) -> None:
        assert self.rates is not None
        if self.device != "cuda":
            self.skip("parts alone", "CUDA events need a GPU")
            return
        for part in kernels.parts(self.shape, self.sizes, self.rates):
            self.attempt(part[0], partial(self._part, part))

    def _part(self, part: kernels.Part) -> None:
        self.results.add("kernels", kernels.measure_part(part))

    def serve_and_measure(self) -> None:
        """Start the server, then measure the steps and the gaps between kernels."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = write_model(folder / "model", self.shape)
            server = Server(model, self.flags(), folder / "log")
            stack.callback(server.stop)
            began = time.monotonic()
            base_url = server.wait_until_ready().base_url
            for row in start_rows(time.monotonic() - began, server.tail(100_000)):
                self.results.add("machine", row)
            client = steps.Requests(base_url, self.left)
            self.measure_steps(client)
            self.measure_outside(client, folder / "traces")
            if self.results.content["errors"]:
                print(f"end of the server's log:\n{server.tail(15)}", flush=True)

    def flags(self) -> list[str]:
        dtype = "bfloat16" if self.shape.dtype_bytes == 2 else "float32"
        flags = [
            *("--load-format", "dummy", "--dtype", dtype, "--log-level", "info"),
            *("--dllm-algorithm", DEFAULT_ALGORITHM),
            *("--max-running-requests", str(max(16, self.sizes.most_requests))),
            *("--max-prefill-tokens", str(max(16384, self.sizes.most_tokens))),
        ]
        if self.args.attention_backend:
            flags += ["--attention-backend", self.args.attention_backend]
        return flags + self.args.server_arg

    def measure_steps(self, client: steps.Requests) -> None:
        cases = list(self.sizes)
        for index, case in enumerate(cases):
            share = (self.left() - PROFILE_SECONDS) / (len(cases) - index)
            if share <= 0:
                self.skip(case.name, "no time left for it")
                continue
            # Most cases need less than their share, so that a large one may have more.
            budget = min(CASE_SECONDS, 2 * share)
            self.attempt(case.name, partial(self._step, client, case, budget))

    def _step(self, client: steps.Requests, case: Case, budget: float) -> None:
        assert self.rates is not None
        row = steps.measure_case(client, case, self.shape, self.rates, budget)
        self.results.add("steps", row)

    def measure_outside(self, client: steps.Requests, folder: Path) -> None:
        if self.device != "cuda":
            self.skip("outside the model's kernels", "no GPU, no kernels to add up")
            return
        for case in self.sizes.goals:
            name = f"outside, {case.name}"
            self.attempt(name, partial(self._outside, client, case, folder))

    def _outside(self, client: steps.Requests, case: Case, folder: Path) -> None:
        measured = {row["name"]: row["ms"] for row in self.results.content["steps"]}
        if case.name not in measured:
            raise steps.StepError("its step was not measured")
        row = traces.measure_outside(client, case, measured[case.name], folder)
        self.results.add("outside", row)


def start_rows(seconds: float, log: str) -> list[dict[str, Any]]:
    """The start-up of a server, and the CUDA graphs that its log tells of."""
    found: list[tuple[str, float, str]] = [("server start", seconds, "s")]
    if about := ESTIMATED.search(log):
        found.append(("CUDA graphs, estimated memory", float(about[1]), "MiB"))
    if captured := CAPTURED.search(log):
        names = "forwards", "steps", "capture", "memory"
        units = "", "", "s", "MiB"
        found += [
            (f"CUDA graphs, {name}", float(value), unit)
            for name, value, unit in zip(names, captured.groups(), units, strict=True)
        ]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in found]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark/gpu/run.sh", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="JSON file, with the tables beside it",
    )
    add("--quick", action="store_true", help="the goals alone")
    add("--layers", type=int, help="of the model (32; on a CPU 2)")
    add("--hidden", type=int, help="width of the model (4096; on a CPU 64)")
    add("--cpu-shadow", action="store_true", help="tiny on the CPU, GPU or not")
    add("--attention-backend", help="of the server; default: its own choice")
    add("--server-arg", action="append", default=[], help="one more for the server")
    add("--minutes", type=float, default=8.5, help="nothing new starts after that")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = build_parser().parse_args(arguments)
    args.command = arguments
    # The server has a process group of its own. It would outlive a killed run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.cpu_shadow:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    plugins = metadata.entry_points(group="sglang.srt.plugins")
    if "sglang_dllm" not in plugins.names:
        print("run.sh: sglang-dllm is not installed: pip install .", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: a tiny shape on the CPU, to check the script", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(args, device)
    if run.attempt("machine", run.measure_machine):
        run.attempt("parts alone", run.measure_parts)
        run.attempt("server", run.serve_and_measure)
    run.results.content["seconds"] = round(args.minutes * 60 - run.left(), 1)
    run.results.save()
    print(f"\n{markdown(run.results.content)}")
    return 1 if run.results.content["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
