"""``--dtype auto``: the dtype in which a checkpoint is served.

SGLang serves a checkpoint in float16 where config.json names no dtype or float32. The
logits of a model that was trained in bfloat16 or float32 can overflow there, and the
published tokens are others.
"""

from __future__ import annotations

import json
import logging
import platform
from typing import Any

import torch
from transformers import PretrainedConfig

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.stored_dtype import stored_dtype

logger = logging.getLogger(__name__)

_NAMES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    # Nobody serves in double precision.
    "float64": torch.float32,
    "double": torch.float32,
}


def settle_dtype(server_args: Any) -> None:
    """Set ``dtype`` where it is ``auto``. The user's own choice stays.

    The dtype is the one that config.json names, or else the one that the checkpoint's
    tensors have. A CPU that would only emulate it gets float32, and FlashInfer, which
    has no float32, gets bfloat16.

    Args:
        server_args: the flags, read and written here.

    Raises:
        ConfigError: neither config.json nor the tensors tell a dtype.
    """
    if server_args.dtype != "auto":
        return
    found, source = _published(server_args), "config.json"
    if found is None:
        source = "its tensors"
        found = stored_dtype(server_args.model_path, server_args.revision)
    if found is None:
        raise ConfigError(
            f"{server_args.model_path}: config.json names no dtype, and no tensors "
            "were found that tell it; add --dtype bfloat16, float16 or float32"
        )
    if found is torch.float64:
        found = torch.float32
    server_args.dtype, reason = _name(found), f"the checkpoint's, by {source}"
    if found is torch.float32 and server_args.attention_backend == "flashinfer":
        # d3LLM's launch lines name it, whatever the checkpoint.
        server_args.dtype, reason = "bfloat16", "FlashInfer does not compute in float32"
    elif server_args.device == "cpu" and not is_native(found):
        server_args.dtype = "float32"
        reason = (
            f"not {_name(found)}, which is {reason}: this processor does not multiply "
            "it natively; --dtype overrides this"
        )
    logger.info("dtype %s, %s", server_args.dtype, reason)


def is_native(dtype: torch.dtype) -> bool:
    """True if this machine's CPU has instructions that multiply a dtype."""
    if dtype is torch.float32:
        return True
    features = torch.cpu.get_capabilities()
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says of every AVX-512 processor that it supports bfloat16. Without
        # these instructions it converts each product to float32.
        kind = "bf16" if dtype is torch.bfloat16 else "fp16"
        return bool(features.get(f"avx512_{kind}") or features.get(f"amx_{kind}"))
    supported = torch.ops.mkldnn._is_mkldnn_fp16_supported
    if dtype is torch.bfloat16:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(supported())


def _published(server_args: Any) -> torch.dtype | None:
    """The dtype in config.json or in ``--json-model-override-args``."""
    try:
        config, _ = PretrainedConfig.get_config_dict(
            server_args.model_path, revision=server_args.revision
        )
        config = config | json.loads(server_args.json_model_override_args)
    except Exception:  # SGLang meets the same error later and reports it
        return None
    nested = [value for value in config.values() if isinstance(value, dict)]
    for part in (config, *nested):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in _NAMES:
                return _NAMES[name]
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
