"""Checks on a CPU that tensor code would never make the host wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FORBIDDEN = {
    "aten::_local_scalar_dense": "reads a value",
    "aten::equal": "reads a value",
    "aten::allclose": "reads a value",
    "aten::nonzero": "has a shape that depends on values",
    "aten::masked_select": "has a shape that depends on values",
    "aten::bincount": "has a shape that depends on values",
    "aten::_unique2": "has a shape that depends on values",
    "aten::unique_dim": "has a shape that depends on values",
    "aten::unique_consecutive": "has a shape that depends on values",
}

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")

UPLOADS = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions that copy values of the host to the device that they are given."""

FACTORIES = (
    *UPLOADS,
    torch.arange,
    torch.empty,
    torch.full,
    torch.ones,
    torch.zeros,
)
"""Functions whose result is on the host unless they are given a device."""

MOVES = ("to", "cpu", "cuda")
"""Methods of a tensor that copy it to another device, and wait unless told not to."""

READS = ("tolist", "numpy", "__array__")
"""Methods of a tensor that give its values to the host."""


class SyncDetector(TorchDispatchMode):
    """Raises RuntimeError where an operation would wait for a device.

    Two kinds are found: an operation that needs a value of a tensor, and a blocking
    copy between host and device. On a CPU a copy does nothing, so the second kind is
    found by how it is called, and by where its source came from. A tensor over memory
    of NumPy is on the host, and so is one that the watched code makes without a device
    or from another tensor of the host. Every other tensor is on the device.

    A copy that is asked not to wait may come from memory that is not pinned. CUDA then
    copies to a buffer of its own first, which waits for no kernel.
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
        name, kwargs = func._schema.name, kwargs or {}
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} {FORBIDDEN[name]}")
        if name in INDEXING and any(_is_mask(t) for t in tree_leaves(args[1])):
            raise RuntimeError(f"{name} by a mask has a shape that depends on values")
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            raise RuntimeError(f"{name} without output_size reads a value")
        return func(*args, **kwargs)


class _CopyDetector(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._on_host = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        host = [t for t in given if self._is_on_host(t)]
        moves = name in MOVES and func is getattr(torch.Tensor, name, None)
        moves = moves and _names_device(name, args, kwargs)
        if len(host) < len(given):
            self._check(name, args, kwargs, host)
        if func in UPLOADS and kwargs.get("device") is not None:
            raise RuntimeError(f"torch.{name} copies from the host, and waits for it")
        if moves and not _is_async(args, kwargs):
            raise RuntimeError(f"Tensor.{name} copies to a device, and waits for it")
        out = func(*args, **kwargs)
        if moves and out is args[0]:
            out = out.clone()  # as on a real device, where the two differ
        is_new = func in FACTORIES and not given and kwargs.get("device") is None
        is_derived = given and len(host) == len(given) and not moves
        if is_new or is_derived:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._on_host[tensor] = True
        return out

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        # Memory of NumPy cannot be resized. Its import goes past this mode.
        is_numpy = tensor.device.type == "cpu" and not (
            tensor.is_sparse or tensor.untyped_storage().resizable()
        )
        return is_numpy or tensor in self._on_host

    def _check(self, name: str, args: Any, kwargs: Any, host: list[Any]) -> None:
        """Check a call that has a tensor of the device among its arguments."""
        if name in READS:
            raise RuntimeError(f"Tensor.{name} reads values, and waits for them")
        if name == "new_tensor":
            raise RuntimeError("Tensor.new_tensor copies from the host, and waits")
        if name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            raise RuntimeError("an index that is a list is copied, and waited for")
        is_async_copy = name == "copy_" and (
            kwargs.get("non_blocking") or any(a is True for a in args[2:3])
        )
        # A number may come from the host: it travels with the launch of its kernel.
        if any(tensor.ndim for tensor in host) and not (
            is_async_copy or name in _READ_NOTHING
        ):
            raise RuntimeError(f"{name} copies a tensor of the host, and waits for it")


_READ_NOTHING = ("__get__", "to", "type_as", "view_as", "expand_as")
"""Calls that take a tensor for its shape or device alone, or are checked elsewhere."""


def _has_list(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) for part in parts)


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
