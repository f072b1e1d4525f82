"""sglang.srt.server_args

Upstream: derives memory shares, graph capture and scheduling from the flags, for
models that prefill once and decode.
Ours: a full-attention model turns prefix sharing, chunked prefill and SGLang's own
graphs off, and refuses flags that would have no meaning (``config.launch_flags``),
before anything is derived. Any other launch reads nothing more than it did
(``upstream.launch``). Errors of ours end a command-line launch with one line, not a
traceback.
Goes when: upstream asks the model for such defaults (a resolution hook).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_dllm.errors import ConfigError, UpstreamContractError
from sglang_dllm.upstream.hooks import Hook


def _handle_missing_default_values(
    original: Callable[..., Any], server_args: Any
) -> Any:
    from sglang_dllm.config.launch_flags import settle_launch_flags
    from sglang_dllm.decoding.registry import algorithms
    from sglang_dllm.models.facts import FAMILIES
    from sglang_dllm.upstream.launch import architecture_of, is_of_another_plugin

    result = original(server_args)
    architecture = architecture_of(server_args)
    algorithm = server_args.dllm_algorithm
    # A name of ours is ours, as in ``config.server.decodes``.
    is_theirs = algorithm not in algorithms() and is_of_another_plugin(algorithm)
    if architecture in FAMILIES and not is_theirs:
        from sglang_dllm.patches import HOOKS

        # A field that SGLang does not have any more must not end in an AttributeError.
        HOOKS.verify()
        settle_launch_flags(server_args, architecture)
    return result


def _prepare_server_args(original: Callable[..., Any], argv: list[str]) -> Any:
    from sglang_dllm.config.launch_flags import require_algorithm
    from sglang_dllm.models.facts import FAMILIES

    try:
        server_args = original(argv)
        # SGLang has read the config by now, a repository's too.
        config = getattr(server_args, "model_config", None)
        names = getattr(getattr(config, "hf_config", None), "architectures", None)
        if names and names[0] in FAMILIES:
            require_algorithm(server_args, names[0])
        return server_args
    except (ConfigError, UpstreamContractError) as error:
        print(f"sglang-dllm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


HOOKS = (
    Hook(
        target="sglang.srt.server_args.ServerArgs._handle_missing_default_values",
        fn=_handle_missing_default_values,
        why="flags get other defaults, or are refused, for whole-canvas prefills",
        contract=("self",),
        remove_when="upstream asks the model for such defaults",
    ),
    Hook(
        target="sglang.srt.server_args.prepare_server_args",
        fn=_prepare_server_args,
        why="a wrong flag of ours is one line and exit status 2, not a traceback",
        contract=("argv",),
        remove_when="upstream reports ValueError of flags in one line",
        always=True,
    ),
)
