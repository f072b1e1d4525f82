"""The object SGLang's worker calls for one denoising step of a batch."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm

from sglang_dllm.decoding.multi_block import MultiBlockDecoder
from sglang_dllm.forward_plan import ForwardPlan, forward_plan
from sglang_dllm.scheduling.dllm_config import FullAttnDllmConfig


class FullAttnAlgorithm(DllmAlgorithm):
    """Runs one forward over whole canvases and commits what the decoder picks."""

    def __init__(self, config: FullAttnDllmConfig) -> None:
        super().__init__(config)
        self.decoder = MultiBlockDecoder(config.decode, config.facts)

    def run(
        self, model_runner: Any, forward_batch: Any, algo_states: Any = None
    ) -> tuple[Any, list[Any], None, None, bool]:
        """One denoising step.

        Args:
            forward_batch: canvases back to back, no prefix.
            algo_states: their ``Blocks``, step begun; written in place.
        """
        lens = [len(blocks.canvas) for blocks in algo_states]
        starts = list(accumulate([0, *lens[:-1]]))
        rows = self.decoder.rows(algo_states, starts)
        device = forward_batch.input_ids.device
        with forward_plan(ForwardPlan(lens, rows.to(device, non_blocking=True))):
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        self.decoder.commit_step(out.logits_output.full_logits, algo_states)
        out.logits_output.full_logits = None
        return out.logits_output, [], None, None, out.can_run_graph
