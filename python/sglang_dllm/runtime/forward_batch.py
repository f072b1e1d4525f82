"""SGLang's forward batch with our plan."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_dllm.attention.plan import AttentionPlan


@dataclass
class CanvasForwardBatch(ForwardBatch):
    """The forward batch of one packed forward.

    SGLang rebuilds a batch on its way to the model with ``dataclasses.replace``, which
    keeps the class and its fields. ``attention.plan.plan_of`` reads the plan.

    Attributes:
        plan: of this forward.
    """

    plan: AttentionPlan | None = None

    @classmethod
    def of(
        cls,
        forward_batch: ForwardBatch,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
    ) -> CanvasForwardBatch:
        """A batch of SGLang's, or one of ours, for a new forward.

        SGLang's own positions are those of the last tokens of a sequence, and a window
        may begin anywhere.

        Args:
            forward_batch: copied, and left as it is.
            input_ids, positions: ``(T,)`` int64, of the plan's T tokens.
        """
        declared: dict[str, Any] = {
            field.name: getattr(forward_batch, field.name)
            for field in fields(ForwardBatch)
        }
        declared |= {"input_ids": input_ids, "positions": positions}
        return cls(**declared, plan=plan)

    def point_to(
        self, input_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan
    ) -> None:
        """Take the inputs of the next forward with the same windows."""
        self.input_ids, self.positions, self.plan = input_ids, positions, plan
