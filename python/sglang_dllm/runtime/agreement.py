"""The agreement of SGLang's tensor-parallel ranks, over their CPU group."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from sglang_dllm.decoding.agreement import Agree, Event, RanksDiffer, alone


def agreement_of(group: Any) -> Agree:
    """The agreement of the ranks of a process group on the CPU.

    It does not touch the device: on a GPU it runs beside the forward.

    Args:
        group: ``torch.distributed``'s; None for the default group.
    """
    if distributed.get_world_size(group) == 1:
        return alone

    def agree(event: Event) -> None:
        extremes = torch.tensor([event, -event])
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group)
        highest, lowest = int(extremes[0]), -int(extremes[1])
        if highest != lowest:
            raise RanksDiffer(
                f"tensor-parallel ranks differ: {Event(lowest).name} on one, "
                f"{Event(highest).name} on another, {event.name} on this one"
            )

    return agree
