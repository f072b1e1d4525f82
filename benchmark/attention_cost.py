"""Ragged full attention on fresh q, k, v against SGLang's pool-gathering path.

    python benchmark/attention_cost.py

Prints, per batch shape, the ratio of SGLang's own torch_native extend (write k and v
to the pool, gather them back, attend) to ours, medians of 7, same run, same tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.attention.sdpa import canvas_attention
from sglang_dllm.decoding.window import Window

HEADS, KV_HEADS, HEAD_DIM, REPEATS = 8, 4, 64, 7
SHAPES = {
    "1 canvas of 128": [128],
    "1 canvas of 512": [512],
    "16 canvases of 128": [128] * 16,
    "16 ragged, 40 to 340": list(range(40, 360, 20)),
}


def seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    for name, lens in SHAPES.items():
        total = sum(lens)
        q = torch.randn(total, HEADS, HEAD_DIM)
        k, v = torch.randn(2, total, KV_HEADS, HEAD_DIM)
        pool_k, pool_v = torch.zeros(2, total + 1, KV_HEADS, HEAD_DIM)
        slots = torch.arange(1, total + 1)
        table = torch.zeros(len(lens), max(lens), dtype=torch.int32)
        start = 0
        for row, length in enumerate(lens):
            table[row, :length] = slots[start : start + length]
            start += length
        seq_lens = torch.tensor(lens)
        backend = SimpleNamespace()
        rows = [Window(0, length, length) for length in lens]
        plan = AttentionPlan(rows, torch.tensor([0]))

        def upstream(
            q: torch.Tensor = q,
            k: torch.Tensor = k,
            v: torch.Tensor = v,
            pool_k: torch.Tensor = pool_k,
            pool_v: torch.Tensor = pool_v,
            slots: torch.Tensor = slots,
            table: torch.Tensor = table,
            seq_lens: torch.Tensor = seq_lens,
            backend: SimpleNamespace = backend,
        ) -> torch.Tensor:
            pool_k[slots], pool_v[slots] = k, v
            out: torch.Tensor = TorchNativeAttnBackend._run_sdpa_forward_extend(
                backend,
                q,
                torch.empty_like(q),
                pool_k,
                pool_v,
                table,
                torch.arange(len(seq_lens)),
                seq_lens,
                torch.zeros_like(seq_lens),
                seq_lens,
                scaling=HEAD_DIM**-0.5,
                enable_gqa=True,
                causal=False,
            )
            return out

        def ours(
            q: torch.Tensor = q,
            k: torch.Tensor = k,
            v: torch.Tensor = v,
            plan: AttentionPlan = plan,
            pool_k: torch.Tensor = pool_k,
            pool_v: torch.Tensor = pool_v,
        ) -> torch.Tensor:
            return canvas_attention(q, k, v, plan, pool_k, pool_v, HEAD_DIM**-0.5)

        assert torch.allclose(upstream(), ours(), atol=1e-5)
        theirs, mine = seconds(upstream), seconds(ours)
        print(
            f"{name:<22} SGLang {theirs * 1e3:7.2f} ms   "
            f"ours {mine * 1e3:7.2f} ms   ratio {theirs / mine:5.2f}"
        )


if __name__ == "__main__":
    main()
