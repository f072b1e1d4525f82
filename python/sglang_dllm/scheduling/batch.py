"""A forward batch of whole canvases, ragged and unpadded."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch
from sglang.srt.mem_cache.allocation import alloc_req_slots
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import ceil_align

from sglang_dllm.decoding.algorithm import DecodingState
from sglang_dllm.decoding.step import sequences


class CanvasBatch(ScheduleBatch):
    """One denoising step of several canvases.

    ``dllm_config`` stays None: with it SGLang would number the positions and look
    for slots by blocks of one size. ``is_dllm`` alone routes the result to us.
    """

    def is_dllm(self) -> bool:
        return True

    def prepare(self) -> None:
        """Set what a forward reads, for the requests' canvases as they are now."""
        states: list[DecodingState] = [req.dllm_algo_state for req in self.reqs]
        rows = sequences(states)
        lens = [len(row) for row in rows]
        # A guided canvas has a second row. It shares the first one's slots: a forward
        # attends to its fresh keys and values, and nobody reads those in the pool.
        owners = [*self.reqs, *(r for r in self.reqs if r.dllm_algo_state.is_guided)]
        pool_indices = torch.tensor([req.req_pool_idx for req in owners])
        ids = torch.from_numpy(np.concatenate(rows))
        on_gpu = torch.device(self.device).type == "cuda"
        self.forward_mode = ForwardMode.DLLM_EXTEND
        self.prefill_input_ids_cpu = ids.pin_memory() if on_gpu else ids
        self.prefix_lens = [0] * len(lens)
        self.extend_lens = lens
        self.extend_num_tokens = self.seq_lens_sum = sum(lens)
        self.extend_logprob_start_lens = lens
        self.seq_lens_cpu = torch.tensor(lens)
        self.seq_lens = self.seq_lens_cpu.to(self.device, non_blocking=True)
        self.orig_seq_lens = self.seq_lens.to(torch.int32)
        self.req_pool_indices_cpu = pool_indices
        self.req_pool_indices = pool_indices.to(self.device, non_blocking=True)
        table = self.req_to_token_pool.req_to_token
        self.out_cache_loc = torch.cat(
            [
                table[r.req_pool_idx, :length]
                for r, length in zip(owners, lens, strict=True)
            ]
        ).long()
        self.multimodal_inputs = [None] * len(owners)


def try_alloc_canvas_slots(req: Req, canvas_len: int, scheduler: Any) -> bool:
    """Take a request slot and the canvas's KV slots, all or nothing.

    Freed by ``release_canvas_slots`` only.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    pool = scheduler.req_to_token_pool
    need = ceil_align(canvas_len, allocator.page_size)
    if pool.available_size() < 1 or allocator.available_size() < need:
        return False
    slots = allocator.alloc(need)
    if slots is None:
        return False
    (index,) = alloc_req_slots(pool, [req], scheduler.tree_cache)
    pool.write((index, slice(0, canvas_len)), slots[:canvas_len].to(torch.int32))
    req.kv = ReqKvInfo(kv_allocated_len=canvas_len, swa_evicted_seqlen=0)
    req.kv_committed_len = canvas_len
    req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    return True


def release_canvas_slots(req: Req, scheduler: Any) -> None:
    """Give back what ``try_alloc_canvas_slots`` took. Nothing enters a prefix tree:
    with bidirectional attention a prompt's KV belongs to its canvas alone."""
    release_kv_cache(req, scheduler.tree_cache, is_insert=False)
    req.dllm_algo_state = None


def fill_ids(state: DecodingState) -> array[int]:
    """The canvas as SGLang keeps token ids on a request."""
    return array("q", state.canvas.ids.tolist())
