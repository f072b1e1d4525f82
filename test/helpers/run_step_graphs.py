"""Decodes in recorded steps on the demo model in this process.

Prints JSON: for each case what was decoded eagerly and in captured steps, and counts.
It needs a process of its own, since SGLang's parallel state is global.

Args: the cases, as JSON: name, algorithm, cache, prelaunch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmark.in_process import InProcess
from helpers.recorded_capture import FixedAttention, RecordedCapture
from helpers.recorded_steps import Operations
from helpers.static_steps import news
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.static_group import StaticGroup, StepShape
from sglang_dllm.runtime.step_forward import WindowForward
from sglang_dllm.runtime.step_graphs import StepGraphs

CANVAS_LEN, ANSWER_LEN = 128, 64

SIZES = [(25, 60), (11, 45), (40, 33), (7, 64), (19, 20)]
"""Tokens of each prompt and of its answer."""


def make_steps(
    process: InProcess, algorithm: str, options: dict[str, Any], lengths: list[int]
) -> StepGraphs:
    """Captured steps of up to 4 canvases. The runner's attention is replaced."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    runner, facts = process.runner, process.facts
    backend = runner.attn_backend
    attention = backend.canvas_attention = FixedAttention("cpu", CANVAS_LEN)
    ids = torch.zeros(1, dtype=torch.int64)
    template = ForwardBatch(ForwardMode.DLLM_EXTEND, 1, ids, ids, ids, ids, 1)
    decode = process.dllm_config.decode
    static = StaticGroup(
        decode.resolve({"algorithm": algorithm, **options}),
        facts,
        torch.device("cpu"),
        num_canvases=4,
        answer_len=ANSWER_LEN,
        canvas_len=CANVAS_LEN,
    )
    steps = StepGraphs(
        static,
        lambda hidden: runner.model.logits(hidden, template),
        facts.vocab_size,
    )
    capture = RecordedCapture()
    for length in lengths:
        for num in (1, 4):
            forward = WindowForward(
                runner.model, attention, backend, template, num, length
            )
            steps.capture(StepShape(num, length, num * length), forward, capture)
    return steps


def decode(process: InProcess, algorithm: str, options: dict[str, Any]) -> list[Any]:
    """One more request every second round; the news of every canvas at its end."""
    canvases: list[Canvas] = []
    for number, (num_prompt, answer_len) in enumerate(SIZES):
        prompt = range(5 + number, 5 + number + num_prompt)
        more = {"max_forwards": 6} if number == 3 else {}
        canvases.append(
            process.add(
                list(prompt),
                answer_len,
                algorithm,
                options | more,
                ignore_eos=number % 2 == 1,
            )
        )
        process.run_round()
        process.run_round()
        # The pool's last canvas waits until there is room in the captured batch.
        while len(process.requests) > 3:
            process.run_round()
    while process.requests:
        process.run_round()
    return [news(canvas) for canvas in canvases]


class Watch:
    """Counts captured and eager steps, and what computes between two replays."""

    def __init__(self, process: InProcess) -> None:
        self.num_captured = self.num_eager = 0
        self.between: list[list[str]] = []
        self.operations = Operations()
        self._last: Any = None
        model = process.model
        launch, launch_step = model.launch, model.launch_step
        steps = model.steps
        assert steps is not None

        def eager(*args: Any) -> Any:
            self.num_eager += 1
            self._last = None
            return launch(*args)

        def captured(group: Any) -> bool:
            since = list(self.operations.names)
            if not launch_step(group):
                return False
            if self._last is group:
                self.between.append(since)
            self._last = group
            self.num_captured += 1
            self.operations.names.clear()
            return True

        model.launch, model.launch_step = eager, captured  # type: ignore[method-assign]


def main() -> None:
    from sglang_dllm.demo import demo_path

    process = InProcess(str(demo_path()))
    found = {}
    for name, algorithm, options, prelaunch in json.loads(sys.argv[1]):
        process.new_engine(2, prelaunch)
        eager = decode(process, algorithm, options)
        lengths = [128] if options["cache"] == "none" else [32, 64]
        attention = process.runner.attn_backend.canvas_attention
        steps = make_steps(process, algorithm, options, lengths)
        process.new_engine(2, prelaunch, steps=steps)
        watch = Watch(process)
        with watch.operations:
            captured = decode(process, algorithm, options)
        process.runner.attn_backend.canvas_attention = attention
        found[name] = {
            "eager": eager,
            "captured": captured,
            "num_captured": watch.num_captured,
            "num_eager": watch.num_eager,
            "between": watch.between,
        }
    # SGLang prints to the same stream, so the reader takes the last line.
    print(json.dumps(found))


if __name__ == "__main__":
    main()
