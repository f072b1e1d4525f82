"""The object SGLang's worker calls for one denoising step of a batch."""

from __future__ import annotations

from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm

from sglang_dllm.decoding.step import commit_step, logits_rows
from sglang_dllm.forward_plan import ForwardPlan, forward_plan


class FullAttnAlgorithm(DllmAlgorithm):
    """Runs one forward over whole canvases and commits what their algorithms pick."""

    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: Any = None
    ) -> tuple[Any, list[Any], None, None, bool]:
        """One denoising step.

        Args:
            forward_batch: the rows of ``step.sequences`` back to back, no prefix.
            algo_states: a ``DecodingState`` for each request, step begun; written in
                place.
        """
        lens = forward_batch.extend_seq_lens_cpu
        rows = logits_rows(algo_states)
        device = forward_batch.input_ids.device
        with forward_plan(ForwardPlan(lens, rows.to(device, non_blocking=True))):
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        commit_step(out.logits_output.full_logits, algo_states)
        out.logits_output.full_logits = None
        return out.logits_output, [], None, None, out.can_run_graph
