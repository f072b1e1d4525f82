"""The model of a launch. A launch that is not ours must read nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def architecture_of(server_args: Any) -> str | None:
    """The first architecture in the config of the model that is to be served.

    A folder's config.json is read. A repository's config is SGLang's own read, which
    is cached: SGLang needs it later in the same launch and sends no second request.
    Without ``--dllm-algorithm`` no repository is asked, and a file is never opened: it
    may be a GGUF file with all the weights.

    Returns:
        None where there is no such config, or where the launch is not ours for sure.
    """
    path = Path(server_args.model_path)
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            config |= json.loads(server_args.json_model_override_args)
        except (OSError, ValueError, TypeError):
            return None
        return _first(config.get("architectures"))
    if server_args.dllm_algorithm is None or path.exists():
        return None
    return _first(getattr(_cached_config(server_args), "architectures", None))


def _first(architectures: Any) -> str | None:
    if isinstance(architectures, list | tuple) and architectures:
        return str(architectures[0])
    return None


def _cached_config(server_args: Any) -> Any:
    """SGLang's config of a repository; None where SGLang will fail to read it."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    # Mirrors SGLang's ModelConfig.__init__: the arguments are the cache's key.
    extra = {}
    if (server_args.decrypted_config_file or "").strip():
        extra["_configuration_file"] = server_args.decrypted_config_file.strip()
    try:
        return get_config(
            server_args.model_path,
            trust_remote_code=server_args.trust_remote_code,
            revision=server_args.revision,
            model_override_args=json.loads(server_args.json_model_override_args),
            model_config_parser=server_args.model_config_parser,
            **extra,
        )
    except Exception:  # SGLang meets the same error later and reports it
        return None


def is_of_another_plugin(algorithm: str | None) -> bool:
    """True if a plugin other than ours brought SGLang an algorithm of this name."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    found = algo_name_to_cls.get(algorithm)
    return found is not None and found.__module__.split(".")[0] not in (
        "sglang",
        "sglang_dllm",
    )
