"""The model of a launch. A launch that is not ours must read nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.facts import architecture_in


def architecture_of(server_args: Any) -> str | None:
    """The first architecture in the config of the model that is to be served.

    Returns:
        None where there is no such config, or where the launch is not ours for sure.
    """
    fields = fields_of(server_args)
    return None if fields is None else architecture_in(fields)


def fields_of(server_args: Any) -> dict[str, Any] | None:
    """The fields of the config of the model that is to be served.

    A folder's config.json is read. A repository's config is SGLang's own read, which
    is cached: SGLang needs it later in the same launch and sends no second request.
    Without ``--dllm-algorithm`` no repository is asked, and a file is never opened: it
    may be a GGUF file with all the weights.

    Returns:
        None as ``architecture_of``.

    Raises:
        ConfigError: a repository's config has a field of ours with a wrong value.
    """
    path = Path(server_args.model_path)
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            fields: dict[str, Any] = config | json.loads(
                server_args.json_model_override_args
            )
        except (OSError, ValueError, TypeError):
            return None
        return fields
    if server_args.dllm_algorithm is None or path.exists():
        return None
    config = _cached_config(server_args)
    return None if config is None else config.to_dict()


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
    except ConfigError:
        raise
    except Exception:  # SGLang meets the same error later and reports it
        return None


def is_known_to_sglang(algorithm: str) -> bool:
    """True if SGLang's table of algorithms has the name: its own, or a plugin's.

    None of ours is in the table by its own name.
    """
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    return algorithm in algo_name_to_cls


def is_of_another_plugin(algorithm: str | None) -> bool:
    """True if a plugin other than ours brought SGLang an algorithm of this name."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    found = algo_name_to_cls.get(algorithm)
    return found is not None and found.__module__.split(".")[0] not in (
        "sglang",
        "sglang_dllm",
    )
