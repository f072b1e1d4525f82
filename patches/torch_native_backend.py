"""sglang.srt.layers.attention.torch_native_backend

Upstream: writes fresh k and v to the pool and gathers them back per request.
Ours: the windows of canvases attend to whole canvases. A full prefill does so over its
fresh q, k, v directly; only a canvas with a cache writes to the pool and reads it.
Goes when: upstream's backend skips the gather for prefills without a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.attention.plan import current_plan
from sglang_dllm.upstream.hooks import Hook


def _forward_extend(
    original: Callable[..., Any],
    self: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> Any:
    plan = current_plan()
    if plan is None:
        return original(self, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang_dllm.attention.sdpa import canvas_attention

    out = canvas_attention(
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
        plan,
        self.token_to_kv_pool.get_key_buffer(layer.layer_id),
        self.token_to_kv_pool.get_value_buffer(layer.layer_id),
        layer.scaling,
    )
    return out.flatten(1)


HOOKS = (
    Hook(
        target="sglang.srt.layers.attention.torch_native_backend."
        "TorchNativeAttnBackend.forward_extend",
        fn=_forward_extend,
        why="upstream gathers k and v from the pool per request and layer",
        contract=("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        remove_when="upstream attends over fresh k and v without a prefix",
    ),
)
