"""sglang.srt.layers.attention.triton_backend

Upstream: in each layer attends to a cached prefix in the pool and to the fresh tokens
behind it, in two parts of one kernel.
Ours: the windows of canvases attend to whole canvases, over fresh keys or over the pool
(``attention.triton``); upstream's own metadata is left out.
Goes when: upstream takes queries from the middle of a sequence, without a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.attention.plan import current_plan
from sglang_dllm.upstream.hooks import Hook


def _init_forward_metadata(
    original: Callable[..., Any], self: Any, forward_batch: Any
) -> Any:
    plan = current_plan()
    if plan is None:
        return original(self, forward_batch)
    from sglang_dllm.attention.triton import TritonCanvasAttention

    TritonCanvasAttention.of(self).plan(plan)
    return None


def _forward_extend(
    original: Callable[..., Any],
    self: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: Any = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
) -> Any:
    if current_plan() is None:
        return original(
            *(self, q, k, v, layer, forward_batch, save_kv_cache),
            *(sinks, score_mod, aux_tensors),
        )
    from sglang_dllm.attention.base import into_pool
    from sglang_dllm.attention.triton import TritonCanvasAttention

    k_pool, v_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
    out = TritonCanvasAttention.of(self).run(
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
        k_pool,
        v_pool,
        layer.scaling,
        write=into_pool(self.token_to_kv_pool, layer),
        k_scale=layer.k_scale_float,
        v_scale=layer.v_scale_float,
    )
    return out.flatten(1)


_BACKEND = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"

HOOKS = (
    Hook(
        target=f"{_BACKEND}.init_forward_metadata",
        fn=_init_forward_metadata,
        why="upstream gathers slots of a prefix before new tokens only",
        contract=("self", "forward_batch"),
        remove_when="upstream takes queries from the middle of a sequence",
    ),
    Hook(
        target=f"{_BACKEND}.forward_extend",
        fn=_forward_extend,
        why="windows of canvases attend to whole canvases, by our kernel",
        contract=(
            *("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
            *("sinks", "score_mod", "aux_tensors"),
        ),
        remove_when="upstream takes queries from the middle of a sequence",
    ),
)
