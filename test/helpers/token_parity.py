"""The tokens of the plain references, for comparisons with SGLang's."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.random_settings import Case, random_case
from helpers.toy_model import reference_sampling
from reference.algorithms import nfe_at_visible, run
from reference.decoding import Result, visible
from reference.models import ReferenceModel

NOISE = 2e-5
"""In nats, logits or probabilities. Forwards of a batch and of one canvas, or of one
rank and of two, round float32 numbers differently, by less than this."""

NEWLINE = 10  # the tiny tokenizers are of bytes


@dataclass(frozen=True)
class Kind:
    """One architecture: its checkpoint, its launch flags and its number of cases."""

    sampler_family: str
    write: Callable[[Path], Path]
    eot_token: int | None = None
    flags: tuple[str, ...] = ()
    yaml: Mapping[str, Any] = field(default_factory=dict)
    cases: int = 10


@dataclass
class Oracle:
    """The plain reference of a checkpoint, and requests for it."""

    kind: Kind
    model: ReferenceModel

    @property
    def tokens(self) -> list[int]:
        vocab_size = self.model.module.config.vocab_size
        return [t for t in range(vocab_size) if t != self.model.eos_id]

    def cases(self, algorithm: str, seed: int) -> list[Case]:
        rng = random.Random(f"{algorithm}-{seed}")
        return [
            random_case(rng, algorithm, self.kind.sampler_family, self.tokens)
            for _ in range(self.kind.cases)
        ]

    def expected(self, case: Case) -> Result:
        given = self.kind.yaml
        defaults = dict(given.get("algorithms", {}).get(case.algorithm, {}))
        if case.algorithm == "FullAttnMultiBlock":
            server = ("algorithms", "steps_per_round", "prelaunch")
            defaults = {key: given[key] for key in given if key not in server}
        if "factor" in case.options:
            defaults = {"threshold": None}
        options = {**defaults, **case.options}
        if case.ignore_eos and case.algorithm == "FullAttnMultiBlock":
            options["early_stop"] = False
        return run(
            case.algorithm,
            self.model,
            list(case.prompt),
            case.length,
            options,
            reference_sampling(case.sampling),
            family=self.kind.sampler_family.lower(),
            mask_id=self.model.mask_id,
            eos_id=self.model.eos_id,
            template=case.template,
            eot_token_id=self.kind.eot_token,
            delimiter_ids=options.get("delimiter_ids") or [NEWLINE],
        )

    def check(self, case: Case, output_ids: list[int], meta: dict[str, Any]) -> bool:
        """Assert equal tokens and forwards.

        Returns:
            True if they are. A choice that float32 noise decides may differ.
        """
        expected, eos = self.expected(case), self.model.eos_id
        ids, nfe = expected.ids, expected.nfe
        if not case.ignore_eos:
            ids = visible(expected, eos)
            nfe = nfe_at_visible(expected, eos)
        if output_ids != ids or meta["num_forwards"] != nfe:
            closest = min(step.margin for step in expected.trace)
            assert closest < NOISE, (case, output_ids, ids, meta, closest)
            warnings.warn(f"{case}: decided within float32 noise", stacklevel=2)
            return False
        if nfe == expected.nfe:  # else the server ended before the reference did
            for key in ("tokens_computed", "tokens_cached", "full_refreshes"):
                assert meta[key] == getattr(expected, key), (case, key)
        return True
