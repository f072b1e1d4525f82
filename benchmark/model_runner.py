"""A ModelRunner of SGLang in this process.

One per process, since SGLang's parallel state is global.
"""

from __future__ import annotations

from typing import Any


def load(path: str, *flags: str) -> Any:
    """A ModelRunner with its KV pool and attention backend, as the server builds it."""
    from sglang.benchmark.one_batch import load_model
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(
        [
            *("--model-path", path, "--dllm-algorithm", "FullAttnMultiBlock"),
            *("--max-total-tokens", "4096", "--max-running-requests", "8"),
            *flags,
        ]
    )
    wrapped, _ = load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    return next(v for v in vars(wrapped).values() if hasattr(v, "model"))
