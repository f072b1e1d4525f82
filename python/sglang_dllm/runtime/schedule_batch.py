"""SGLang's batch of a round and of a forward, and the slots of a request."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Self

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.allocation import alloc_req_slots
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.common import ceil_align

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.upstream.compat import clear_prefix, hold_slots, release_slots


class CanvasScheduleBatch(ScheduleBatch):
    """Windows of canvases, ragged and unpadded.

    A window appears to SGLang as the end of its canvas: that many new tokens behind a
    prefix. SGLang sizes its ``ForwardBatch`` by it. The attention plan says which
    positions are computed.

    ``dllm_config`` stays None: with it SGLang would number the positions and look for
    slots by blocks of one size. ``is_dllm`` alone routes the result to our hook.
    """

    def is_dllm(self) -> bool:
        return True

    @classmethod
    def of_round(cls, scheduler: Any, reqs: Sequence[Req]) -> Self:
        """The batch that the scheduler sees: the requests, and sizes for its metrics.

        It has no tokens. The engine packs forwards itself.
        """
        batch = cls._new(scheduler, scheduler.tp_worker.model_runner, list(reqs))
        canvases = [req.dllm_algo_state.canvas for req in reqs]
        # A canvas that has not joined yet has no window. Its first one is full.
        lens = [_window_len(canvas) or len(canvas) for canvas in canvases]
        ids = torch.empty(sum(lens), dtype=torch.int64, device=batch.device)
        batch._set_windows(canvases, lens, ids)
        return batch

    @classmethod
    def of_forward(cls, runner: Any, packed: PackedForward) -> Self:
        """The batch from which SGLang makes the forward batch of a packed forward."""
        batch = cls._new(runner, runner, [])
        slots = packed.token_slots()
        batch._set_windows(packed.canvases, packed.lens, packed.input_ids, slots)
        return batch

    @classmethod
    def _new(cls, owner: Any, runner: Any, reqs: list[Req]) -> Self:
        batch: Self = cls.init_new(
            reqs,
            owner.req_to_token_pool,
            owner.token_to_kv_pool_allocator,
            getattr(owner, "tree_cache", None),
            runner.model_config,
            False,
            owner.spec_algorithm,
        )
        return batch

    def _set_windows(
        self,
        canvases: Sequence[Canvas],
        lens: list[int],
        input_ids: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Set what SGLang reads of each window: its tokens, its canvas and its slots.

        Args:
            canvases: the canvas of each window.
            lens: tokens of each window, T together.
            input_ids: ``(T,)`` int64.
            slots: ``(T,)`` int64: of the pool. None for a batch that runs no forward.
        """
        canvas_lens = [len(canvas) for canvas in canvases]
        self.input_ids, self.out_cache_loc = input_ids, slots
        owners = torch.tensor([canvas.req_pool_index for canvas in canvases])
        self.forward_mode = ForwardMode.DLLM_EXTEND
        # SGLang would say so of a batch without requests.
        self.is_prefill_only = False
        # A forward gives SGLang none. Emission writes those of the tokens.
        self.return_logprob = False
        self.prefix_lens = [a - b for a, b in zip(canvas_lens, lens, strict=True)]
        self.extend_lens = lens
        self.extend_num_tokens = sum(lens)
        self.extend_logprob_start_lens = lens
        self.seq_lens_cpu = torch.tensor(canvas_lens)
        self.seq_lens_sum = sum(canvas_lens)
        self.seq_lens = self.seq_lens_cpu.to(self.device, non_blocking=True)
        lens32 = torch.tensor(canvas_lens, dtype=torch.int32)
        self.orig_seq_lens = lens32.to(self.device, non_blocking=True)
        self.req_pool_indices_cpu = owners
        self.req_pool_indices = owners.to(self.device, non_blocking=True)
        self.multimodal_inputs = [None] * len(lens)


def try_alloc_canvas_slots(req: Req, canvas: Canvas, scheduler: Any) -> bool:
    """Take a request slot and the KV slots of a canvas, all or nothing.

    ``release_canvas_slots`` frees them, nothing else does.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    pool = scheduler.req_to_token_pool
    canvas_len = len(canvas)
    need = ceil_align(canvas_len, allocator.page_size)
    slots = _free_slots(need, scheduler) if pool.available_size() else None
    if slots is None:
        return False
    (index,) = alloc_req_slots(pool, [req], scheduler.tree_cache)
    # A view would keep the allocator's whole list of free slots in memory.
    canvas.place(slots.clone(), index)
    _note_slots(req, canvas, canvas_len, pool)
    clear_prefix(req)
    return True


def try_extend_canvas_slots(req: Req, canvas: Canvas, scheduler: Any) -> bool:
    """Take the KV slots by which a canvas has grown, all or nothing.

    A canvas that got shorter keeps the slots that it has.
    """
    allocator, held = scheduler.token_to_kv_pool_allocator, canvas.held_slots
    assert held is not None and canvas.req_pool_index is not None
    need = ceil_align(len(canvas), allocator.page_size) - len(held)
    if need > 0:
        slots = _free_slots(need, scheduler)
        if slots is None:
            return False
        held = torch.cat([held, slots])
    canvas.place(held, canvas.req_pool_index)
    num_noted = max(len(canvas), req.kv.kv_allocated_len)
    _note_slots(req, canvas, num_noted, scheduler.req_to_token_pool)
    return True


def _free_slots(num: int, scheduler: Any) -> torch.Tensor | None:
    """KV slots of the pool, which are taken then; None where it has fewer."""
    allocator = scheduler.token_to_kv_pool_allocator
    slots: torch.Tensor | None = None
    if allocator.available_size() >= num:
        slots = allocator.alloc(num)
    return slots


def set_aside_slots(req: Req, canvas: Canvas, scheduler: Any) -> None:
    """Free the slots of a canvas that goes on later with other ones."""
    release_slots(req, scheduler.tree_cache)
    canvas.lose_slots()


def _note_slots(req: Req, canvas: Canvas, num_tokens: int, pool: Any) -> None:
    """Tell SGLang of the first slots that a canvas holds, so that it frees them."""
    assert canvas.held_slots is not None
    place = canvas.req_pool_index, slice(0, num_tokens)
    pool.write(place, canvas.held_slots[:num_tokens].to(torch.int32))
    hold_slots(req, num_tokens)


def release_canvas_slots(req: Req, scheduler: Any) -> None:
    """Free the slots that ``try_alloc_canvas_slots`` took.

    Nothing enters a prefix tree: with bidirectional attention the keys and values of
    a prompt belong to its canvas alone.
    """
    release_slots(req, scheduler.tree_cache)
    req.dllm_algo_state = None


def fill_ids(canvas: Canvas) -> array[int]:
    """The token ids of a canvas in SGLang's type."""
    return array("q", canvas.ids.tolist())


def _window_len(canvas: Canvas) -> int:
    start, end = canvas.window
    return end - start
