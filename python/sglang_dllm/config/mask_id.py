"""The mask id of a checkpoint whose config.json has none."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from sglang_dllm.models.facts import Family
from sglang_dllm.models.tokenizers import tokenizer_of

logger = logging.getLogger(__name__)


def settle_mask_id(server_args: Any, family: Family, fields: Mapping[str, Any]) -> None:
    """Find the mask id in the tokenizer, and override config.json with it.

    Every process of the launch then reads it where the others have it. Nothing is set
    if the tokenizer has no mask either: ``ModelFacts`` refuses such a launch.

    Args:
        server_args: the flags, read and written here.
        fields: of config.json, with ``--json-model-override-args`` applied.
    """
    if fields.get("mask_token_id") is not None:
        return
    found = mask_id_in(tokenizer_of(None, server_args), family)
    if found is None:
        return
    overrides = json.loads(server_args.json_model_override_args or "{}")
    overrides["mask_token_id"] = found
    server_args.json_model_override_args = json.dumps(overrides)
    logger.info("config.json has no mask_token_id; the tokenizer says %d", found)


def mask_id_in(tokenizer: Any, family: Family) -> int | None:
    """The id of the tokenizer's mask token, or of the family's text of it.

    Args:
        tokenizer: None where the checkpoint has none.
    """
    if tokenizer is None:
        return None
    named: int | None = getattr(tokenizer, "mask_token_id", None)
    if named is not None:
        return named
    found: int | None = tokenizer.get_vocab().get(family.mask_token)
    return found
