"""sglang.srt.server_args

Upstream: ``_handle_dllm_inference`` prepares flags for block-causal dLLMs: FlashInfer
for CUDA graphs, a page size that divides the block.
Ours: a full-attention model turns prefix sharing, chunking and graphs off and refuses
flags that would have no meaning (``scheduling.launch_flags``). Errors of ours end a
command-line launch with one line instead of a traceback.
Goes when: upstream asks the model for such defaults (a resolution hook).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_dllm.errors import ConfigError, UpstreamContractError
from sglang_dllm.hooks import Hook


def _handle_dllm_inference(original: Callable[..., Any], server_args: Any) -> Any:
    from sglang_dllm.scheduling.dllm_config import is_full_attention

    hf_config = server_args.get_model_config().hf_config
    if not is_full_attention(hf_config):
        return original(server_args)
    from sglang_dllm.scheduling.launch_flags import settle_launch_flags

    settle_launch_flags(server_args, hf_config)
    return original(server_args)


def _prepare_server_args(original: Callable[..., Any], argv: list[str]) -> Any:
    try:
        return original(argv)
    except (ConfigError, UpstreamContractError) as error:
        print(f"sglang-dllm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


HOOKS = (
    Hook(
        target="sglang.srt.server_args.ServerArgs._handle_dllm_inference",
        fn=_handle_dllm_inference,
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
    ),
)
