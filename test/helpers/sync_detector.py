"""Tensor code that must not ask the device for a value, checked on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = {
    "aten::_local_scalar_dense": "reads a value",
    "aten::nonzero": "has a shape that depends on values",
    "aten::masked_select": "has a shape that depends on values",
    "aten::_unique2": "has a shape that depends on values",
}

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")


class SyncDetector(TorchDispatchMode):
    """Raises RuntimeError where an operation would wait for a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} {FORBIDDEN[name]}")
        if name in INDEXING and any(_is_mask(t) for t in tree_leaves(args[1])):
            raise RuntimeError(f"{name} by a mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool
