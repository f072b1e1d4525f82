"""A forward batch of canvases' windows, ragged and unpadded."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch
from sglang.srt.mem_cache.allocation import alloc_req_slots
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import ceil_align

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.window import Window


class CanvasScheduleBatch(ScheduleBatch):
    """The denoising steps of several canvases in one round.

    ``dllm_config`` stays None: with it SGLang would number the positions and look
    for slots by blocks of one size. ``is_dllm`` alone routes the result to us.
    """

    layout: PackedForward
    _planned_rows: list[Window]

    def is_dllm(self) -> bool:
        return True

    @property
    def canvases(self) -> list[Canvas]:
        return [req.dllm_algo_state.canvas for req in self.reqs]

    def prepare(self, layout: PackedForward) -> bool:
        """Set what the next forward reads. Returns False where only ids changed.

        A window appears to SGLang as the end of its canvas: as many new tokens behind
        a prefix that fills up the canvas. Its forward batch is made from that; what
        attends to what is the plan's business.
        """
        is_new = getattr(self, "layout", None) is not layout
        self.layout = layout
        if not is_new:
            return False
        rows = layout.rows
        self._planned_rows = [
            Window(
                *row.canvas.window,
                len(row.canvas),
                row.canvas.kv_slots if row.canvas.has_cache else None,
            )
            for row in rows
        ]
        lens = layout.lens
        # A guided canvas has a second row. It shares the first one's slots: a forward
        # attends to its fresh keys and values, and nothing is kept in the pool.
        indices = [req.req_pool_idx for req in self.reqs]
        pool_indices = dict(zip(map(id, self.canvases), indices, strict=True))
        owners = torch.tensor([pool_indices[id(row.canvas)] for row in rows])
        self.forward_mode = ForwardMode.DLLM_EXTEND
        self.input_ids = self.prefill_input_ids_cpu = layout.input_ids
        self.prefix_lens = [len(row.canvas) - row.length for row in rows]
        self.extend_lens = lens
        self.extend_num_tokens = sum(lens)
        self.extend_logprob_start_lens = lens
        self.seq_lens_cpu = torch.tensor([len(row.canvas) for row in rows])
        self.seq_lens_sum = int(self.seq_lens_cpu.sum())
        self.seq_lens = self.seq_lens_cpu.to(self.device, non_blocking=True)
        self.orig_seq_lens = self.seq_lens.to(torch.int32)
        self.req_pool_indices_cpu = owners
        self.req_pool_indices = owners.to(self.device, non_blocking=True)
        self.out_cache_loc = torch.cat(
            [row.canvas.kv_slots[slice(*row.canvas.window)] for row in rows]
        )
        self.multimodal_inputs = [None] * len(rows)
        return True

    def plan(self) -> AttentionPlan:
        """The forward that ``prepare`` was told of."""
        return AttentionPlan(self._planned_rows, self.layout.logits_indices)


def try_alloc_canvas_slots(req: Req, canvas: Canvas, scheduler: Any) -> bool:
    """Take a request slot and the canvas's KV slots, all or nothing.

    Freed by ``release_canvas_slots`` only.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    pool = scheduler.req_to_token_pool
    canvas_len = len(canvas)
    need = ceil_align(canvas_len, allocator.page_size)
    if pool.available_size() < 1 or allocator.available_size() < need:
        return False
    slots = allocator.alloc(need)
    if slots is None:
        return False
    (index,) = alloc_req_slots(pool, [req], scheduler.tree_cache)
    pool.write((index, slice(0, canvas_len)), slots[:canvas_len].to(torch.int32))
    canvas.kv_slots = slots[:canvas_len]
    req.kv = ReqKvInfo(kv_allocated_len=canvas_len, swa_evicted_seqlen=0)
    req.kv_committed_len = canvas_len
    req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    return True


def release_canvas_slots(req: Req, scheduler: Any) -> None:
    """Give back what ``try_alloc_canvas_slots`` took. Nothing enters a prefix tree:
    with bidirectional attention a prompt's KV belongs to its canvas alone."""
    release_kv_cache(req, scheduler.tree_cache, is_insert=False)
    req.dllm_algo_state = None


def fill_ids(canvas: Canvas) -> array[int]:
    """The canvas as SGLang keeps token ids on a request."""
    return array("q", canvas.ids.tolist())
