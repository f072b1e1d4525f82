"""Ragged full attention over fresh q, k, v, against SGLang's way through the KV pool.

    python -m benchmark.speed.attention_cost [--json OUT]

SGLang's own torch_native extend writes k and v to the pool, gathers them back and
attends. The table has the ratio of its time to ours for each shape of a batch, medians
of 7, on the same tensors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median
from types import SimpleNamespace

import torch

from benchmark.command import Figures, parser_of, run_command

HEADS, KV_HEADS, HEAD_DIM, REPEATS = 8, 4, 64, 7
SHAPES = {
    "1 canvas of 128": [128],
    "1 canvas of 512": [512],
    "16 canvases of 128": [128] * 16,
    "16 ragged, 40 to 340": list(range(40, 360, 20)),
}

Run = Callable[[], torch.Tensor]


def milliseconds(run: Run) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def both_ways(lens: Sequence[int]) -> tuple[Run, Run]:
    """SGLang's attention and ours over one batch of canvases."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sglang_dllm.attention.plan import AttentionPlan
    from sglang_dllm.attention.sdpa import canvas_attention
    from sglang_dllm.decoding.window import Window

    total, scale = sum(lens), HEAD_DIM**-0.5
    q = torch.randn(total, HEADS, HEAD_DIM)
    k, v = torch.randn(2, total, KV_HEADS, HEAD_DIM)
    pool_k, pool_v = torch.zeros(2, total + 1, KV_HEADS, HEAD_DIM)
    slots = torch.arange(1, total + 1)
    table = torch.zeros(len(lens), max(lens), dtype=torch.int32)
    for row, (end, length) in enumerate(zip(accumulate(lens), lens, strict=True)):
        table[row, :length] = slots[end - length : end]
    seq_lens = torch.tensor(lens)
    windows = [Window(0, length, length) for length in lens]
    plan = AttentionPlan(windows, torch.tensor([0]))

    def upstream() -> torch.Tensor:
        pool_k[slots], pool_v[slots] = k, v
        out: torch.Tensor = TorchNativeAttnBackend._run_sdpa_forward_extend(
            SimpleNamespace(),
            q,
            torch.empty_like(q),
            pool_k,
            pool_v,
            table,
            torch.arange(len(lens)),
            seq_lens,
            torch.zeros_like(seq_lens),
            seq_lens,
            scaling=scale,
            enable_gqa=True,
            causal=False,
        )
        return out

    return upstream, lambda: canvas_attention(q, k, v, plan, pool_k, pool_v, scale)


def measure(args: argparse.Namespace) -> Figures:
    found = {}
    for name, lens in SHAPES.items():
        upstream, ours = both_ways(lens)
        assert torch.allclose(upstream(), ours(), atol=1e-5)
        found[name] = {"sglang": milliseconds(upstream), "ours": milliseconds(ours)}
    return found


def show(figures: Figures) -> str:
    return "\n".join(
        f"{name:<22} SGLang {ms['sglang']:7.2f} ms   ours {ms['ours']:7.2f} ms   "
        f"ratio {ms['sglang'] / ms['ours']:5.2f}"
        for name, ms in figures.items()
    )


if __name__ == "__main__":
    sys.exit(run_command(parser_of(__doc__), measure, show))
