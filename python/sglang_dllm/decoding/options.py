"""Options of the algorithms: frozen, strict, each with the words an error needs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The description is what an error message says is allowed.
BlockSize = Annotated[int, Field(ge=1, le=4096, description="an integer, 1 to 4096")]
Steps = Annotated[int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")]
Nats = Annotated[float, Field(ge=0, le=1000, description="nats, 0 to 1000")]
Share = Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")]
Bool = Annotated[bool, Field(description="true or false")]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(max_length=256, description="a list of up to 256 token ids"),
]


class Options(BaseModel):
    """What every algorithm takes.

    Attributes:
        max_forwards: forwards after which the request ends; the last one commits
            every mask that is left. None: as many as the algorithm needs.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False
    )

    exclusive: ClassVar[tuple[str, ...]] = ()
    """Keys of which a request names at most one; it then replaces the others'
    defaults."""

    max_forwards: (
        Annotated[int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")]
        | None
    ) = None

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        given = [key for key in self.exclusive if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self
