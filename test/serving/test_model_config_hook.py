"""SGLang's own default sampling of our models, and of other models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dllm.patches.model_config import HOOKS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("model", {"temperature": 0.7, "top_p": 0.8}),
        ("openai", {"temperature": 0.0}),
    ],
)
def test_sglangs_chat_gets_what_every_route_gets(
    source: str, expected: dict[str, Any]
) -> None:
    """A repetition penalty here would refuse every chat request."""
    fields = {"repetition_penalty": 1.05, "min_p": 0.1}
    fields |= {"temperature": 0.7, "top_p": 0.8}
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["DreamModel"]),
        hf_generation_config=SimpleNamespace(to_dict=lambda: fields),
        sampling_defaults=source,
    )
    (hook,) = HOOKS
    assert hook.fn(lambda self: fields, config) == expected
