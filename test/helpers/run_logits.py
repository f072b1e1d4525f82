"""Runs checkpoints through SGLang's ModelRunner, outside of a server.

``python -m helpers.run_logits JOB.pt OUT.pt``: JOB holds (checkpoint folder,
launch flags, batches) triples, a batch being a list of canvases' token ids. For each,
OUT gets the float32 logits, nested alike, and the quantizable layers, or the error.
SGLang's parallel state is global, so that this runs in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from benchmark.model_runner import load
from helpers.other_process import leave


@dataclass
class Request:
    """The attributes of a request that our batch and SGLang's ForwardBatch read."""

    dllm_algo_state: Any
    req_pool_idx: int
    rid: str = "0"
    lora_id: None = None


@dataclass
class State:
    canvas: Any


@torch.no_grad()
def run_batch(runner: Any, canvases: list[list[int]]) -> list[torch.Tensor]:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_dllm.attention.plan import AttentionPlan
    from sglang_dllm.decoding.window import Window
    from sglang_dllm.runtime.forward_batch import CanvasForwardBatch

    lens = [len(ids) for ids in canvases]
    total = sum(lens)
    seq_lens = torch.tensor(lens)
    starts = list(accumulate([0, *lens[:-1]]))
    windows = [Window(0, length, length) for length in lens]
    batch = CanvasForwardBatch(
        forward_mode=ForwardMode.DLLM_EXTEND,
        batch_size=len(lens),
        input_ids=torch.tensor([token for ids in canvases for token in ids]),
        req_pool_indices=torch.arange(1, len(lens) + 1),
        seq_lens=seq_lens,
        out_cache_loc=torch.arange(1, total + 1),
        seq_lens_sum=total,
        seq_lens_cpu=seq_lens,
        positions=torch.cat([torch.arange(n) for n in lens]),
        extend_seq_lens=seq_lens.to(torch.int32),
        extend_prefix_lens=torch.zeros(len(lens), dtype=torch.int32),
        extend_start_loc=torch.tensor(starts, dtype=torch.int32),
        extend_seq_lens_cpu=lens,
        extend_prefix_lens_cpu=[0] * len(lens),
        extend_num_tokens=total,
        extend_logprob_start_lens_cpu=lens,
        plan=AttentionPlan(windows, torch.arange(total)),
    )
    out = runner.forward(batch, pp_proxy_tensors=None)
    logits = runner.model.logits(out.logits_output.hidden_states, batch)
    return [x.clone() for x in logits.split(lens)]


def quantized_layers(runner: Any) -> dict[str, str]:
    """Class by name of each layer that asks a quantization config for its method."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    asked: dict[str, str] = {}

    class Recorder:
        def get_name(self) -> str:
            return "recorder"

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            asked[prefix] = type(layer).__name__
            return UnquantizedLinearMethod() if "Linear" in asked[prefix] else None

    type(runner.model)(runner.model.config, quant_config=Recorder())
    return asked


def run_job(
    job: str,
    out: str,
    look: Callable[[Any], dict[str, Any]],
    prepare: Callable[[list[Any]], None] = lambda batches: None,
) -> None:
    """Load the checkpoints of JOB one by one, and write the results to OUT.

    Args:
        look: returns more results of a loaded runner, beside its logits.
        prepare: called with the batches before their checkpoint is loaded.
    """
    from sglang.srt.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )
    from sglang.srt.plugins import load_plugins

    load_plugins()
    outcomes = []
    for path, flags, batches in torch.load(job):
        prepare(batches)
        try:
            runner = load(path, *flags)
        except ValueError as error:
            outcomes.append({"error": str(error)})
        else:
            logits = [run_batch(runner, batch) for batch in batches]
            outcomes.append({"logits": logits, **look(runner)})
        destroy_model_parallel()
        destroy_distributed_environment()
    torch.save(outcomes, out)


def main(job: str, out: str) -> None:
    run_job(job, out, lambda runner: {"quantized": quantized_layers(runner)})


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
