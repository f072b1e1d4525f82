"""sglang.srt.configs.model_config

Upstream: the chat routes fill in what the checkpoint's generation_config.json says, a
repetition penalty too, and the other routes fill in nothing.
Ours: what every route fills in (``serving.sampling_defaults``).
Goes when: upstream fills in the same on every route, and asks the model which defaults
it honours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _get_default_sampling_params(
    original: Callable[..., Any], self: Any
) -> dict[str, Any]:
    from sglang_dllm.models.facts import FAMILIES

    names = getattr(self.hf_config, "architectures", None) or [None]
    if names[0] not in FAMILIES:
        found: dict[str, Any] = original(self)
        return found
    from sglang_dllm.serving.sampling_defaults import (
        SamplingDefaults,
        generation_config_of,
    )

    config = generation_config_of(self)
    return SamplingDefaults.of_server(None, config).to_dict()


HOOKS = (
    Hook(
        target="sglang.srt.configs.model_config.ModelConfig"
        ".get_default_sampling_params",
        fn=_get_default_sampling_params,
        why="a field of generation_config.json that is refused in a request would end "
        "every chat request",
        contract=("self",),
        remove_when="upstream asks the model which defaults it honours",
    ),
)
