"""Tells errors that end one request from errors that must end the process."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from sglang_dllm.decoding.agreement import Agree, Event, RanksDiffer, alone
from sglang_dllm.decoding.logits import HeadError

_FAULTS = (RanksDiffer, HeadError, torch.OutOfMemoryError, torch.AcceleratorError)

_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Words of CUDA's, the CPU allocator's and cuBLAS's errors."""

OUT_OF_MEMORY = (
    "the server ran out of memory in a forward that this request was part of; "
    "ask again, or for a shorter answer"
)
"""A client's message. The allocator's own tells of the host."""


def is_device_fault(error: BaseException) -> bool:
    """True for a failure of the forward or of the device, or of one rank alone.

    With tensor parallelism, one rank may fail alone. If it continued, the other ranks
    would block in a collective. So the process must end.
    """
    return isinstance(error, _FAULTS) or "CUDA error" in text_of(error)


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a failed allocation, or an error that a failed allocation caused.

    It leaves the device as it was: the next allocation may succeed.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError):
        text = text_of(error)
        if any(words in text for words in _NO_MEMORY):
            return True
    return error is not None and is_out_of_memory(error.__cause__)


def ends_requests_only(error: BaseException, agree: Agree) -> bool:
    """True for an allocation that failed on the only rank.

    Its requests end and the process goes on. With more ranks, the others may have had
    the memory; they wait in a collective.
    """
    return agree is alone and is_out_of_memory(error)


def text_of(error: BaseException) -> str:
    """The message of an error; its class if a third party's message raises."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def message_of(error: BaseException) -> str:
    """The text of an error for a client that did not cause it."""
    return OUT_OF_MEMORY if is_out_of_memory(error) else text_of(error)


class Guard:
    """A ``with`` block around code that may be a third party's.

    The ranks agree at its end, so that a block which fails on one of them ends the
    launch. Each collective in the block must be announced too (``Event.HEAD``): the
    ranks agree in an order, and a rank that is at the end does not meet one that is
    about to enter a collective.

    Attributes:
        caught: whether the block raised an error that was handled.
    """

    def __init__(
        self, handle: Callable[[Exception], None], agree: Agree = alone
    ) -> None:
        """
        Args:
            handle: gets the error, unless it is a fault of the device. It gets a
                failed allocation too where there is one rank.
            agree: of the ranks that run the block.
        """
        self._handle, self._agree = handle, agree
        self.caught = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            self._agree(Event.DONE)
            return False
        if not isinstance(error, Exception):
            return False
        if is_device_fault(error) and not ends_requests_only(error, self._agree):
            return False
        self._agree(Event.FAILED)
        self.caught = True
        self._handle(error)
        return True
