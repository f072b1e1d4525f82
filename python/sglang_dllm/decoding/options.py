"""Options of the algorithms: frozen, strict, each with the words an error needs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The description is what an error message says is allowed.
BlockSize = Annotated[int, Field(ge=1, le=4096, description="an integer, 1 to 4096")]
StepCount = Annotated[
    int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")
]
Nats = Annotated[float, Field(ge=0, le=1000, description="nats, 0 to 1000")]
Probability = Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")]
Bool = Annotated[bool, Field(description="true or false")]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(max_length=256, description="a list of up to 256 token ids"),
]

ForwardCount = Annotated[
    int, Field(ge=0, le=100_000, description="an integer, 0 to 100000")
]
TokenCount = Annotated[int, Field(ge=0, le=4096, description="an integer, 0 to 4096")]


class Options(BaseModel):
    """What every algorithm takes.

    Attributes:
        cache: what a forward may leave as it was (``decoding.cache``). ``none``
            recomputes all and is exact; the others are approximations.
        cache_delay_iter: forwards that a finished block waits for the cache.
        refresh_interval: every so many forwards all is recomputed.
        prefix_look, after_look: tokens recomputed before and behind the block.
        warmup: forwards at the beginning that recompute all.
        max_forwards: forwards after which the request ends; the last one commits
            every mask that is left. None: as many as the algorithm needs.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False
    )

    exclusive: ClassVar[tuple[str, ...]] = ()
    """Keys of which a request names at most one; it then replaces the others'
    defaults."""

    cache: Annotated[
        Literal["none", "prefix", "dual", "delayed", "vicinity"],
        Field(description="none, prefix, dual, delayed or vicinity"),
    ] = "none"
    cache_delay_iter: ForwardCount = 2
    refresh_interval: Annotated[
        int, Field(ge=1, le=100_000, description="an integer, 1 to 100000")
    ] = 3
    prefix_look: TokenCount = 16
    after_look: TokenCount = 16
    warmup: ForwardCount = 4
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
