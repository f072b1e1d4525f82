"""Options of the algorithms: frozen, strict, each with the words an error needs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The description is what an error message says is allowed.
BlockSize = Annotated[int, Field(ge=1, le=4096, description="an integer, 1 to 4096")]
StepCount = Annotated[
    int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")
]
ForwardCount = Annotated[
    int, Field(ge=0, le=100_000, description="an integer, 0 to 100000")
]
TokenCount = Annotated[int, Field(ge=0, le=4096, description="an integer, 0 to 4096")]
Nats = Annotated[float, Field(ge=0, le=1000, description="nats, 0 to 1000")]
Probability = Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")]
Bool = Annotated[bool, Field(description="true or false")]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(max_length=256, description="a list of up to 256 token ids"),
]


class StrictModel(BaseModel):
    """A frozen model that takes no unknown key and coerces no type."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False
    )


class Options(StrictModel):
    """The options that every algorithm takes.

    Attributes:
        max_forwards: forwards after which the request ends; the last one commits
            every mask that is left. None: as many as the algorithm needs.
    """

    mutually_exclusive: ClassVar[tuple[str, ...]] = ()
    """Keys of which a request names at most one. Naming one drops the defaults of the
    others."""

    max_forwards: StepCount | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        keys = self.mutually_exclusive
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self
