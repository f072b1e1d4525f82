"""The model alone, on the packed forwards that a batch of prompts needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmark.in_process import InProcess


class BareModel:
    """Records the packed forwards of some prompts, then runs those and nothing else.

    All prompts start together. A forward is the embedding up to the final norm, called
    without SGLang's runner, and the head over the candidates.
    """

    def __init__(
        self,
        model_path: str,
        prompts: Sequence[list[int]],
        answer_len: int,
        algorithm: str,
        options: dict[str, Any],
    ) -> None:
        from sglang.srt.model_executor.forward_context import ForwardContext

        tokens = sum(len(prompt) + answer_len for prompt in prompts)
        self.model = InProcess(
            model_path,
            *("--max-total-tokens", str(tokens + 64)),
            *("--max-running-requests", str(len(prompts) + 1)),
        )
        self.context = ForwardContext(attn_backend=self.model.runner.attn_backend)
        canvases = [
            self.model.add(prompt, answer_len, algorithm, options) for prompt in prompts
        ]
        self.forwards = self._record()
        self.request_forwards = sum(canvas.num_forwards for canvas in canvases)
        self.answers = [_visible(canvas) for canvas in canvases]

    def _record(self) -> list[Any]:
        """Decode everything. Returns the forward batches, each with its plan."""
        model, forwards = self.model, []
        run = model.runner.forward

        def recorded(batch: Any, **others: Any) -> Any:
            # The denoiser writes the next step into these tensors.
            wanted = batch.plan.logits_indices.clone()
            forwards.append(
                replace(
                    batch,
                    input_ids=batch.input_ids.clone(),
                    positions=batch.positions.clone(),
                    plan=replace(batch.plan, logits_indices=wanted),
                )
            )
            return run(batch, **others)

        model.runner.forward = recorded
        while model.requests:
            model.run_round()
        model.runner.forward = run
        return forwards

    def summary(self) -> dict[str, Any]:
        """Counts of the recorded forwards, and the visible answers."""
        return {
            "packed_forwards": len(self.forwards),
            "forwards": self.request_forwards,
            "tokens": sum(len(batch.input_ids) for batch in self.forwards),
            "logits": sum(len(batch.plan.logits_indices) for batch in self.forwards),
            "threads": torch.get_num_threads(),
            "answers": self.answers,
        }

    @torch.no_grad()
    def run(self) -> tuple[float, float]:
        """Run all forwards once: seconds, and CPU seconds of this process."""
        from sglang.srt.model_executor.forward_context import forward_context

        model = self.model.runner.model
        began, cpu = time.perf_counter(), time.process_time()
        with forward_context(self.context):
            for batch in self.forwards:
                out = model(batch.input_ids, batch.positions, batch)
                model.logits(out.hidden_states, batch)
        return time.perf_counter() - began, time.process_time() - cpu


def _visible(canvas: Any) -> list[int]:
    answer = canvas.ids[canvas.prompt_len :].tolist()
    ends = [index for index, token in enumerate(answer) if token in canvas.eos_ids]
    return answer[: min(ends, default=len(answer))]
