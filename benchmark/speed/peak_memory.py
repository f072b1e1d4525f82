"""Peak memory of one denoising step above the memory before it.

    python -m benchmark.speed.peak_memory [--batch 16] [--canvas-len 512] \
        [--vocab-size 126464] [--hidden-size 64] [--drawn 1] [--case NAME ...] \
        [--json OUT]

The model is a Dream of two small layers and a whole vocabulary with random weights. For
each case a fresh process loads it with its KV pool, admits the canvases and runs one
step in which almost every mask is a candidate. The table has the peak of the resident
memory minus the memory right before the step, when weights, pool and canvases exist and
the pool's pages have been touched. Each stage has its own peak:

- `forward`: the model up to the final norm. Its layers are small (see --hidden-size),
so
  this figure says nothing of a real checkpoint;
- `head`: the logits of a part of the rows;
- `measure`: the best tokens and their statistics;
- `draw`: the tokens of canvases with a temperature;
- `other`: the rest of the step.

Tensors that are alive when a stage begins count for it too. A draw takes long, so only
--drawn canvases of the batch have a temperature. A large figure in all stages but
`forward` is memory that malloc has not given back.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmark.command import Figures, at_least, parser_of, run_command
from benchmark.dummy_checkpoint import write_dream
from benchmark.subprocess_worker import in_subprocess

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "Dream": ("Dream", {}, 0.0),
    "Dream, margin": ("Dream", {"alg": "topk_margin"}, 0.0),
    "FastDLLM": ("FastDLLM", {"steps": 1}, 0.0),
    "Credit": ("Credit", {"block_size": 512}, 0.0),
    "EntropyThreshold": ("EntropyThreshold", {"block_size": 512}, 0.0),
    "Dream, temperature 1": ("Dream", {}, 1.0),
    "Credit, temperature 1": ("Credit", {"block_size": 512}, 1.0),
}
"""Algorithm, options and temperature. On Dream, FastDLLM has no blocks."""

PROMPT_LEN = 8
STAGES = ("forward", "head", "measure", "draw", "other")
MIB = 2**20


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class Watch:
    """The peak of the resident memory in each stage. A stage is a function's call."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(STAGES, 0)
        self.stage = "other"

    def note(self) -> None:
        """Count the peak since the last call for the stage."""
        peak = status("VmHWM")
        self.peaks[self.stage] = max(self.peaks[self.stage], peak)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present

    def over(self, owner: Any, name: str, stage: str) -> None:
        """From now on, count calls of ``owner.name`` for a stage."""
        function = getattr(owner, name)

        def watched(*args: Any, **others: Any) -> Any:
            self.note()
            before, self.stage = self.stage, stage
            try:
                return function(*args, **others)
            finally:
                self.note()
                self.stage = before

        setattr(owner, name, watched)


class Step:
    """The canvases of one case before their first step."""

    def __init__(
        self, path: str, case: str, batch: int, canvas_len: int, drawn: int
    ) -> None:
        from benchmark.in_process import InProcess
        from sglang_dllm.decoding.canvas import SamplingOptions

        self.model = InProcess(
            path,
            *("--load-format", "dummy"),
            *("--max-total-tokens", str(batch * canvas_len + 256)),
            *("--max-running-requests", str(batch + 1)),
        )
        pool = self.model.runner.token_to_kv_pool
        for buffer in [*pool.k_buffer, *pool.v_buffer]:
            buffer.zero_()
        algorithm, options, temperature = CASES[case]
        prompt = list(range(PROMPT_LEN))
        # The first step loads code and fills caches. A small step does so here.
        canvas = self.model.add(prompt, 4, algorithm, options)
        self.model.run_round()
        self.model.remove([canvas])
        for index in range(batch):
            sampling = SamplingOptions(temperature if index < drawn else 0.0)
            answer_len = canvas_len - PROMPT_LEN
            self.model.add(prompt, answer_len, algorithm, options, sampling)

    def run(self) -> dict[str, Any]:
        """Run one step. Peaks are bytes above the memory before it."""
        import ctypes

        from sglang_dllm.decoding import logits, prediction

        runner = self.model.runner
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        watch = Watch()
        watch.over(runner, "forward", "forward")
        watch.over(runner.model, "logits", "head")
        watch.over(logits, "measure", "measure")
        watch.over(prediction, "distribution", "draw")
        watch.over(prediction, "draw", "draw")
        watch.note()
        before, began = status("VmRSS"), perf_counter()
        watch.peaks = dict.fromkeys(STAGES, 0)
        self.model.run_round()
        watch.note()
        return {
            "before": before,
            "peak": max(watch.peaks.values()) - before,
            "stages": {k: max(0, v - before) for k, v in watch.peaks.items()},
            "seconds": perf_counter() - began,
        }


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--batch", type=count, default=16)
    add("--canvas-len", type=at_least(16, int), default=512)
    add("--vocab-size", type=at_least(300, int), default=126464)
    add("--hidden-size", type=at_least(64, int), default=64)
    add("--drawn", type=count, default=1, help="canvases with the case's temperature")
    add("--case", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    return parser


def measure(args: argparse.Namespace) -> Figures:
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        write_dream(Path(folder), hidden=args.hidden_size, vocab=args.vocab_size)
        for case in args.case:
            made = (folder, case, args.batch, args.canvas_len, args.drawn)
            with in_subprocess("benchmark.speed.peak_memory:Step", *made) as call:
                cases[case] = call("run")
    return {
        "batch": args.batch,
        "canvas_len": args.canvas_len,
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "peak": max(case["peak"] for case in cases.values()),
        "cases": cases,
    }


def show(figures: Figures) -> str:
    stages = "".join(f"{stage:>9}" for stage in STAGES)
    lines = [f"{'MiB':<24}{'peak':>7}{stages}{'seconds':>9}"]
    for name, case in figures["cases"].items():
        parts = "".join(f"{case['stages'][stage] / MIB:>9.0f}" for stage in STAGES)
        lines.append(
            f"{name:<24}{case['peak'] / MIB:>7.0f}{parts}{case['seconds']:>9.1f}"
        )
    lines.append(
        f"batch {figures['batch']}, canvas {figures['canvas_len']}, vocabulary "
        f"{figures['vocab_size']}, layers of {figures['hidden_size']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
