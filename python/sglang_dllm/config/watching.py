"""The keys of a request's ``dllm`` object that ask to watch the denoising."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sglang_dllm.decoding.options import Bool, StrictModel


class Watching(StrictModel):
    """
    Attributes:
        trace: the answer has the whole history of its canvas.
        stream: ``draft``: each part of a stream has what the forwards since the last
            part did to the canvas.
    """

    trace: Bool = False
    stream: (
        Annotated[Literal["draft"], Field(description="'draft' or nothing")] | None
    ) = None

    @property
    def is_on(self) -> bool:
        """True if somebody watches the canvas."""
        return self.trace or self.stream is not None

    def to_dict(self) -> dict[str, Any]:
        """The keys that ask for something, as plain values."""
        return self.model_dump(exclude_defaults=True)
