"""The host between two replays of graphs: what it computes, and how long it takes.

    python -m benchmark.speed.launch_gap [--canvases 1 4 16] [--algorithm NAME] \
        [--option KEY=VALUE] [--model-path DIR] [--json OUT]

While a graph runs on a device, the host waits. From the end of that wait to the next
replay, the device has nothing to do. The server's engine decodes held-out problems of
the demo model, once with graphs of forwards, whose decisions run behind the graph, and
once with graphs of whole steps. The table has medians over pairs of replays without an
arrival, a departure or an eager step in between, and then over the passes:

- `computing`: calls of tensor operations that compute, each a kernel on a device;
- `us`: microseconds from the arrival of a step's news to the next replay.

On a CPU there are no graphs. A graph is the function that would be captured, and what
that calls does not count. A tensor operation takes about as much host time as the
launch of a kernel, so the host's part is real. The device's part is not seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.command import Figures, at_least, options_of, run_command, speed_parser
from benchmark.server import heldout_prompts
from benchmark.subprocess_worker import in_subprocess
from sglang_dllm.attention.base import LayerPool, slots_of
from sglang_dllm.attention.plan import AttentionPlan, KVWrites
from sglang_dllm.attention.sdpa import SDPACanvasAttention, SDPAForward, attend

WAYS = ("forward", "step")
"""The contents of a graph."""

CANVAS_LEN = 512


class Operations(TorchDispatchMode):
    """Lists the tensor operations that compute: neither views nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func._schema.name != "aten::empty":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@dataclass
class WindowSlots(SDPAForward):
    """The KV slots of the canvas of each window of a bucket."""

    slots: list[torch.Tensor]


class BucketAttention(SDPACanvasAttention):
    """SDPA over the pool, window by window, so that buckets can be planned."""

    can_be_captured = True

    def new_bucket(
        self, num_windows: int, length: int, max_canvas_len: int, writes: KVWrites
    ) -> WindowSlots:
        return WindowSlots(writes, [], [])

    def fill_bucket(self, bucket: SDPAForward, plan: AttentionPlan) -> None:
        assert isinstance(bucket, WindowSlots)
        bucket.slots = slots_of(plan.windows)

    def attend(
        self,
        forward: SDPAForward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: LayerPool,
        scale: float,
    ) -> torch.Tensor:
        if not isinstance(forward, WindowSlots):
            return super().attend(forward, q, k, v, pool, scale)
        windows = zip(q.chunk(len(forward.slots)), forward.slots, strict=True)
        return torch.cat(
            [attend(w, pool.keys[s], pool.values[s], 1, scale) for w, s in windows]
        )


class Gaps:
    """An engine whose replays are watched. It lives in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        from benchmark.in_process import InProcess
        from sglang_dllm.decoding.canvas import Canvas

        self.args = args
        most = max(args.canvases)
        self.prompts = heldout_prompts(args.model_path, most)
        self.model = InProcess(
            args.model_path,
            *("--max-total-tokens", str(most * CANVAS_LEN)),
            *("--max-running-requests", str(most + 1)),
        )
        self.counter: Operations | None = None
        self.calls, self.since = 0, 0.0
        self.group: Any = None
        self.found: list[tuple[float, float]] = []
        update = Canvas.update

        def heard(canvas: Canvas, *args: Any) -> None:
            self.since = self.since or time.perf_counter()
            update(canvas, *args)

        Canvas.update = heard  # type: ignore[method-assign]

    def table(self) -> list[dict[str, Any]]:
        """Each number of canvases with each kind of graph, in turns."""
        rows = []
        for num in self.args.canvases:
            us: dict[str, list[float]] = {way: [] for way in WAYS}
            computing = {}
            for _ in range(self.args.rounds):
                for way in WAYS:
                    us[way].append(median(t for t, _ in self.one_pass(num, way)))
            for way in WAYS:
                with Operations() as self.counter:
                    computing[way] = median(n for _, n in self.one_pass(num, way))
                self.counter = None
            found = {way: 1e6 * median(times) for way, times in us.items()}
            rows.append({"canvases": num, "us": found, "computing": computing})
        return rows

    def one_pass(self, num: int, way: str) -> list[tuple[float, float]]:
        """The first prompts until one is done: seconds and calls of each gap."""
        model, args, options = self.model, self.args, options_of(self.args)
        model.new_engine(args.steps_per_round, True, **self.graphs(num, way))
        for prompt in self.prompts[:num]:
            model.add(prompt, args.max_new_tokens, args.algorithm, options)
        launch = model.model.launch

        def eager_or_graph(*some: Any) -> Any:
            out = launch(*some)
            if not model.model.in_graph:
                self.group = None
            return out

        model.model.launch = eager_or_graph  # type: ignore[method-assign]
        self.found, self.group = [], None
        while len(model.requests) == num:
            model.run_round()
        model.engine.finish_in_flight()
        model.remove(model.denoiser.canvases)
        return self.found

    def graphs(self, num: int, way: str) -> dict[str, Any]:
        """The graphs of an engine."""
        from sglang_dllm.runtime.graph_grid import SPAN_LENGTHS, Bucket, GraphGrid
        from sglang_dllm.runtime.graphs import CanvasGraphs
        from sglang_dllm.runtime.window_forward import ModelParts

        model, args = self.model, self.args
        model.runner.attn_backend.canvas_attention = BucketAttention("cpu")
        shift = model.facts.family.shift
        grid = GraphGrid(tuple(Bucket(num, n + shift) for n in SPAN_LENGTHS))
        parts = ModelParts.of(model.runner)
        made = CanvasGraphs(parts, model.facts, grid, CANVAS_LEN, self.noted)
        options = {"algorithm": args.algorithm, **options_of(args)}
        decoding = model.dllm_config.decode.resolve(options)
        made.capture_grid(decoding if way == "step" else None)
        if way == "step" and made.steps is None:
            raise ValueError(f"steps of {args.algorithm} are not captured")
        return {"graphs": made}

    def noted(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A capture that captures nothing and notes each replay."""

        def replay() -> Any:
            calls = 0 if self.counter is None else len(self.counter.names)
            group = self.model.denoiser.only_group()
            if group is self.group and self.since:
                gap = time.perf_counter() - self.since
                self.found.append((gap, calls - self.calls))
            out = run()
            self.group, self.since = group, 0.0
            self.calls = 0 if self.counter is None else len(self.counter.names)
            return out

        return replay


def build_parser() -> argparse.ArgumentParser:
    parser = speed_parser(__doc__)
    add, count = parser.add_argument, at_least(1, int)
    add("--canvases", type=count, nargs="+", default=[1, 4, 16])
    add("--steps-per-round", type=count, default=4)
    add("--max-new-tokens", type=count, default=64)
    # One token a step, which gives many steps in one span.
    parser.set_defaults(
        algorithm="FullAttnMultiBlock", option=[("cache", "dual"), ("threshold", 0.0)]
    )
    return parser


def measure(args: argparse.Namespace) -> Figures:
    with in_subprocess("benchmark.speed.launch_gap:Gaps", args) as call:
        kinds = call("table")
    return {
        "algorithm": args.algorithm,
        "options": options_of(args),
        "rounds": args.rounds,
        "kinds": kinds,
    }


def show(figures: Figures) -> str:
    lines = [f"{'canvases':>8}{'graph of a':>12}{'computing':>11}{'us':>8}"]
    lines += [
        f"{row['canvases']:>8}{way:>12}{row['computing'][way]:>11.0f}"
        f"{row['us'][way]:>8.0f}"
        for row in figures["kinds"]
        for way in WAYS
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show))
