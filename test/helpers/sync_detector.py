"""Checks on a CPU that tensor code would never make the host wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = {
    "aten::_local_scalar_dense": "reads a value",
    "aten::nonzero": "has a shape that depends on values",
    "aten::masked_select": "has a shape that depends on values",
    "aten::_unique2": "has a shape that depends on values",
}

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")

UPLOADS = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions that copy values of the host to the device that they are given."""

MOVES = ("to", "cpu", "cuda")
"""Methods of a tensor that copy it to another device, and wait unless told not to."""


class SyncDetector(TorchDispatchMode):
    """Raises RuntimeError where an operation would wait for a device.

    Two kinds are found: an operation that needs a value of a tensor, and a blocking
    copy between host and device. On a CPU a copy does nothing, so the second kind is
    found by how it is called.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies = _CopyDetector()

    def __enter__(self) -> SyncDetector:
        super().__enter__()
        self._copies.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._copies.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} {FORBIDDEN[name]}")
        if name in INDEXING and any(_is_mask(t) for t in tree_leaves(args[1])):
            raise RuntimeError(f"{name} by a mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


class _CopyDetector(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in UPLOADS and kwargs.get("device") is not None:
            raise RuntimeError(f"torch.{name} copies from the host, and waits for it")
        is_move = name in MOVES and func is getattr(torch.Tensor, name, None)
        if (
            is_move
            and _names_device(name, args, kwargs)
            and not _is_async(args, kwargs)
        ):
            raise RuntimeError(f"Tensor.{name} copies to a device, and waits for it")
        return func(*args, **kwargs)


def _names_device(name: str, args: Any, kwargs: Any) -> bool:
    given = [*args[1:2], kwargs.get("device"), kwargs.get("other")]
    return name != "to" or any(
        isinstance(value, torch.device | str | torch.Tensor) for value in given
    )


def _is_async(args: Any, kwargs: Any) -> bool:
    # Positional: to(device, dtype, non_blocking).
    return bool(kwargs.get("non_blocking") or any(a is True for a in args[2:4]))


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool
