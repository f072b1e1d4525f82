"""sglang.srt.layers.attention: the backends of ``attention.backends.BACKENDS``

Upstream: plans for new tokens at the end of a sequence, behind a cached prefix.
Ours: the windows of canvases attend to whole canvases, over fresh keys or over the
pool. A batch that carries an ``AttentionPlan`` goes to the attention of ours for the
backend; every other batch goes to upstream. One pair of hooks is made for each line of
the table.
Goes when: upstream takes queries from the middle of a sequence, without a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from sglang_dllm.attention.backends import BACKENDS, Backend
from sglang_dllm.attention.base import UpstreamLayerPool
from sglang_dllm.attention.plan import plan_of
from sglang_dllm.upstream.hooks import Hook

_REMOVE_WHEN = "upstream takes queries from the middle of a sequence"


def attention_hooks(backend: Backend) -> tuple[Hook, Hook]:
    """The hooks on one attention backend of SGLang: plan a forward, run a layer."""

    def init_forward_metadata(
        original: Callable[..., Any], self: Any, forward_batch: Any
    ) -> Any:
        plan = plan_of(forward_batch)
        if plan is None:
            return original(self, forward_batch)
        backend.attention_of(self).plan(plan)
        return None

    def forward_extend(
        original: Callable[..., Any],
        self: Any,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        *others: Any,
        **named: Any,
    ) -> Any:
        if plan_of(forward_batch) is None:
            return original(self, q, k, v, layer, forward_batch, *others, **named)
        out = backend.attention_of(self).run(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            UpstreamLayerPool.of(self.token_to_kv_pool, layer),
            layer.scaling,
        )
        return out.flatten(1)

    required = ("self", "q", "k", "v", "layer", "forward_batch")
    defaults = {"save_kv_cache": True, **dict.fromkeys(backend.more_parameters)}
    # The other parameters have different names in each backend.
    forward_extend.__signature__ = _signature(  # type: ignore[attr-defined]
        ("original", *required), defaults
    )
    return (
        Hook(
            target=f"{backend.upstream}.init_forward_metadata",
            fn=init_forward_metadata,
            why="upstream plans for new tokens at the end of a sequence only",
            contract=("self", "forward_batch"),
            remove_when=_REMOVE_WHEN,
        ),
        Hook(
            target=f"{backend.upstream}.forward_extend",
            fn=forward_extend,
            why=f"windows attend to whole canvases, by `attention.{backend.ours}`",
            contract=(*required, *defaults),
            remove_when=_REMOVE_WHEN,
        ),
    )


def _signature(required: tuple[str, ...], defaults: dict[str, Any]) -> Signature:
    kind = Parameter.POSITIONAL_OR_KEYWORD
    return Signature(
        [
            *(Parameter(name, kind) for name in required),
            *(Parameter(name, kind, default=value) for name, value in defaults.items()),
        ]
    )


HOOKS = tuple(hook for backend in BACKENDS for hook in attention_hooks(backend))
