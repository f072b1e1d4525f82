"""What is known of each model architecture: one frozen row, looked up by name.

Token ids are never here: they come from the checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dllm.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Facts of one architecture that decoding depends on.

    Attributes:
        architecture: the name in config.json's ``architectures``.
        shift: position i is predicted by the logits of row ``i - shift`` (the
            first position by its own). LLaDA 0; Dream 1, kept from its
            autoregressive initialisation.
        inclusive: accept ``H == threshold`` (d3LLM LLaDA) or not (d3LLM Dream).
        global_minimum: always accept the lowest-entropy candidate of all live
            blocks (d3LLM LLaDA), besides the forced progress of the first
            active block, which both families have.
        defaults: published decoding defaults per algorithm
            (d3LLM evaluation scripts; dParallel for EntropyThreshold).
    """

    architecture: str
    shift: int
    inclusive: bool
    global_minimum: bool
    defaults: Mapping[str, Mapping[str, Any]]


FAMILIES = {
    row.architecture: row
    for row in (
        Family(
            architecture="LLaDAModelLM",
            shift=0,
            inclusive=True,
            global_minimum=True,
            defaults={
                "EntropyThreshold": {"threshold": 0.5, "early_stop": False},
                "FullAttnMultiBlock": {"threshold": 0.5, "early_stop": True},
            },
        ),
        Family(
            architecture="DreamModel",
            shift=1,
            inclusive=False,
            global_minimum=False,
            defaults={
                "EntropyThreshold": {"threshold": 0.45, "early_stop": False},
                "FullAttnMultiBlock": {"threshold": 0.4, "early_stop": False},
            },
        ),
    )
}


@dataclass(frozen=True)
class ModelFacts:
    """A family together with the ids and sizes of one checkpoint."""

    family: Family
    mask_id: int
    eos_ids: tuple[int, ...]
    vocab_size: int

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> ModelFacts:
        """Read the facts from a checkpoint's config.

        Raises:
            ConfigError: the mask or EOS id is missing or outside the vocabulary.
        """
        family = FAMILIES[hf_config.architectures[0]]
        mask_id: Any = getattr(hf_config, "mask_token_id", None)
        eos = getattr(hf_config, "eos_token_id", None)
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        for field, value in [
            ("mask_token_id", mask_id),
            *(("eos_token_id", token) for token in eos_ids),
        ]:
            if not isinstance(value, int) or not 0 <= value < hf_config.vocab_size:
                raise ConfigError(
                    f"the checkpoint's config.json has {field}={value!r}; "
                    f"expected an id from 0 to {hf_config.vocab_size - 1}"
                )
        return cls(family, mask_id, eos_ids, hf_config.vocab_size)
