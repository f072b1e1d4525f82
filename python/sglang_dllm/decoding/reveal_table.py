"""The tokens that a step committed, with their log-probabilities, for the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs


@dataclass(frozen=True)
class RevealTable:
    """The candidates of the canvases that ask, until the host waits for the step.

    How many of them were accepted is known on the device alone. So the
    log-probabilities, which are for the accepted ones, are computed in ``rows``.

    Attributes:
        some: ``(n,)`` int64: the candidates of the canvases that ask.
        accepted: ``(N,)`` bool: of all candidates.
        num_top: K, fewer than the vocabulary has tokens.
    """

    inputs: StepInputs[Any, Any]
    decision: Decision
    some: torch.Tensor
    accepted: torch.Tensor
    num_top: int

    def rows(self, batch: CanvasBatch[Any, Any]) -> torch.Tensor:
        """``(M, 3 + 2 K)`` int64: one row for each token that was committed.

        A row has the canvas's row, the position, the bits of the log-probability, the
        ids of the K best tokens, and the bits of theirs. Waits for the device.

        Args:
            batch: after the step. An algorithm may have filled what is behind an EOS,
                committed or not; such a token was not decided.
        """
        inputs, mask_id = self.inputs, batch.facts.mask_id
        some = self.some[self.accepted[self.some]]
        at = inputs.canvas_index[some], inputs.positions[some]
        some = some[batch.rows.ids[at] == self.decision.tokens[some]]
        if not len(some):
            return some.new_zeros((0, 3 + 2 * self.num_top))
        values, top_ids, top_values = inputs.logits.logprobs(
            some, self.decision.tokens[some], mask_id, self.num_top
        )
        columns = (inputs.canvas_index[some], inputs.positions[some], _bits(values))
        return torch.cat(
            [torch.stack(columns, dim=1), top_ids, _bits(top_values)], dim=1
        )


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int64)
