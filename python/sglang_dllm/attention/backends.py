"""Our attention for each attention backend of SGLang: the one table.

The hooks (``patches.attention_backends``), the CUDA graphs (``runtime.graphs``) and the
checks of launch flags read it. Classes are named by strings, since FlashInfer cannot be
imported everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from sglang_dllm.attention.base import CanvasAttention


@dataclass(frozen=True)
class Backend:
    """One attention backend of SGLang and ours for it.

    Attributes:
        flag: its name in --attention-backend.
        upstream: dotted name of SGLang's class.
        ours: ``module:class`` in this package.
        more_parameters: of SGLang's ``forward_extend``, behind ``save_kv_cache``; all
            have the default None.
    """

    flag: str
    upstream: str
    ours: str
    more_parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of SGLang's class."""
        return self.upstream.rsplit(".", 1)[1]

    @property
    def attention_class(self) -> type[CanvasAttention[Any]]:
        """Our class; its module is imported only now."""
        found: type[CanvasAttention[Any]] = resolve_name(f"{__package__}.{self.ours}")
        return found

    def attention_of(self, backend: Any) -> CanvasAttention[Any]:
        """Ours for an object of SGLang's class: made once, and kept at that object.

        Raises:
            ValueError: as ``CanvasAttention.from_upstream``.
        """
        found: CanvasAttention[Any] | None = getattr(backend, "canvas_attention", None)
        if found is None:
            found = self.attention_class.from_upstream(backend)
            backend.canvas_attention = found
        return found


_UPSTREAM = "sglang.srt.layers.attention"

BACKENDS = (
    Backend(
        "flashinfer",
        f"{_UPSTREAM}.flashinfer_backend.FlashInferAttnBackend",
        "flashinfer:FlashInferCanvasAttention",
    ),
    Backend(
        "triton",
        f"{_UPSTREAM}.triton_backend.TritonAttnBackend",
        "triton:TritonCanvasAttention",
        more_parameters=("sinks", "score_mod", "aux_tensors"),
    ),
    Backend(
        "torch_native",
        f"{_UPSTREAM}.torch_native_backend.TorchNativeAttnBackend",
        "sdpa:SDPACanvasAttention",
    ),
)


def backend_of(upstream: Any) -> Backend | None:
    """The line of the table for an attention backend object of SGLang."""
    name = type(upstream).__name__
    return next((backend for backend in BACKENDS if backend.name == name), None)
