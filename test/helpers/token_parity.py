"""The tokens of the plain references, for comparisons with SGLang's."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers.random_settings import CACHED, Case, growing, has_blocks, random_case
from helpers.toy_model import reference_sampling
from reference.algorithms import nfe_at_visible, run
from reference.decoding import Result, visible
from reference.lengths import DEFAULT_OPTIONS, Answer, run_with_length
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

    def options_of(self, case: Case) -> dict[str, Any]:
        """The options of a case, over the defaults of the server's YAML."""
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
        return options

    def facts_of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The facts that the references ask of the model."""
        return {
            "family": self.kind.sampler_family.lower(),
            "mask_id": self.model.mask_id,
            "eos_id": self.model.eos_id,
            "eot_token_id": self.kind.eot_token,
            "delimiter_ids": options.get("delimiter_ids") or [NEWLINE],
        }

    def expected(self, case: Case) -> Result:
        options = self.options_of(case)
        return run(
            case.algorithm,
            self.model,
            list(case.prompt),
            case.length,
            options,
            reference_sampling(case.sampling),
            **self.facts_of(options),
            template=case.template,
        )

    def growing_cases(self, seed: int) -> list[Case]:
        """Requests whose answers change their length, and find masks to insert."""
        rng = random.Random(f"length-{seed}")
        cases = [
            random_case(rng, algorithm, self.kind.sampler_family, self.tokens)
            for algorithm in CACHED
            for _ in range(3)
        ]
        return [
            growing(rng, case)
            for case in cases
            if has_blocks(case, self.kind.sampler_family)
        ]

    def expected_growing(self, case: Case) -> Answer:
        """The reference of a case whose options name a length rule."""
        own, rule = DEFAULT_OPTIONS[case.options["length"]], case.options["length"]
        plain = {k: v for k, v in case.options.items() if k not in {"length", *own}}
        return run_with_length(
            rule,
            {key: case.options[key] for key in own if key in case.options},
            case.algorithm,
            self.model,
            list(case.prompt),
            case.length,
            self.options_of(replace(case, options=plain)),
            reference_sampling(case.sampling),
            ignore_eos=case.ignore_eos,
            **self.facts_of(plain),
        )

    def check_growing(self, case: Case, answer: dict[str, Any]) -> bool:
        """As ``check`` for a case whose options name a length rule."""
        expected, eos = self.expected_growing(case), self.model.eos_id
        meta, ids = answer["meta_info"], expected.ids
        if eos in ids and not case.ignore_eos:
            ids = ids[: ids.index(eos)]
        counts = ("tokens_computed", "tokens_cached", "full_refreshes")
        wanted = (ids, expected.nfe, *(getattr(expected, key) for key in counts))
        found = (answer["output_ids"], meta["num_forwards"], *map(meta.get, counts))
        if found != wanted:
            margins = [step.margin for step in expected.trace]
            closest = min([*margins, expected.margin])
            assert closest < NOISE, (case, found, wanted, closest)
            warnings.warn(f"{case}: decided within float32 noise", stacklevel=2)
        return found == wanted

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
