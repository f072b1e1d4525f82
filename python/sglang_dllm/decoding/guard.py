"""Tells errors that end one request from errors that must end the process."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from sglang_dllm.decoding.agreement import Agree, Event, RanksDiffer, alone
from sglang_dllm.decoding.logits import HeadError

_FAULTS = (RanksDiffer, HeadError, torch.OutOfMemoryError, torch.AcceleratorError)


def is_device_fault(error: BaseException) -> bool:
    """True for a failure of the forward or of the device, or of one rank alone.

    With tensor parallelism, one rank may fail alone. If it continued, the other ranks
    would block in a collective. So the process must end.
    """
    return isinstance(error, _FAULTS) or "CUDA error" in text_of(error)


def text_of(error: BaseException) -> str:
    """The message of an error; its class if a third party's message raises."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


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
            handle: gets the error, unless it is a fault of the device.
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
        if not isinstance(error, Exception) or is_device_fault(error):
            return False
        self._agree(Event.FAILED)
        self.caught = True
        self._handle(error)
        return True
