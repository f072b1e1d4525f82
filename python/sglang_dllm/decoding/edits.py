"""The edits that requests make to the logits of their canvases, in their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.structure.structure import structured
from sglang_dllm.decoding.token_edits import token_edits


def edited(inputs: StepInputs[Any, Any]) -> StepInputs[Any, Any]:
    """The inputs of a step with the logits that their requests ask for.

    The inputs as they are where no canvas of them has an edit.
    """
    edits = token_edits(inputs)
    if edits:
        logits = inputs.logits
        for edit in edits:
            logits = logits.edited(edit)
        inputs = replace(inputs, logits=logits)
    form = structured(inputs)
    if form is not None:
        logits = inputs.logits.proposed_by(form)
        inputs = replace(inputs, logits=logits, certain=form.certain)
    return inputs
