"""sglang.srt.server_args

Upstream: derives memory shares, graph capture and scheduling from the flags, for
models that prefill once and decode.
Ours: a full-attention model turns prefix sharing, chunked prefill and SGLang's own
graphs off, and refuses flags that would have no meaning (``config.launch_flags``),
before anything is derived. Any other launch reads nothing more than it did
(``upstream.launch``). Errors of ours end a command-line launch with one line, not a
traceback. Flags of d3LLM's launch lines are read under SGLang's present names
(``config.command_line``).
Goes when: upstream asks the model for such defaults. A newer SGLang has such a place
for a step of ours (``add_resolution_steps``); only the command line stays hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_dllm.errors import ConfigError, UpstreamContractError
from sglang_dllm.patches.dllm_config import require_contract
from sglang_dllm.upstream.hooks import Hook


def _handle_missing_default_values(
    original: Callable[..., Any], server_args: Any
) -> Any:
    from sglang_dllm.config.launch_flags import settle_launch_flags
    from sglang_dllm.config.mask_id import settle_mask_id
    from sglang_dllm.models.facts import FAMILIES
    from sglang_dllm.upstream import compat
    from sglang_dllm.upstream.launch import fields_of

    result = original(server_args)
    architecture = _checked(server_args)
    if architecture is not None:
        from sglang_dllm.patches import HOOKS

        # A field that SGLang does not have any more must not end in an AttributeError.
        HOOKS.verify()
        given = compat.given_flags(server_args)
        compat.set_flags(
            server_args,
            lambda flags: settle_launch_flags(flags, architecture, given),
        )
        fields = fields_of(compat.in_effect(server_args)) or {}
        compat.set_flags(
            server_args,
            lambda flags: settle_mask_id(flags, FAMILIES[architecture], fields),
        )
    return result


def _checked(server_args: Any) -> str | None:
    """The architecture of a launch that is ours, once its checkpoint is checked."""
    from sglang_dllm.config.checkpoint import (
        check_checkpoint,
        explain_unknown_model,
        refused_model,
    )
    from sglang_dllm.config.launch_flags import require_algorithm, trust_no_checkpoint
    from sglang_dllm.config.server import load_decode_config
    from sglang_dllm.decoding.registry import algorithms
    from sglang_dllm.models.config_check import with_defaults
    from sglang_dllm.models.facts import FAMILIES, architecture_in
    from sglang_dllm.serving.sampling_defaults import check_preferred
    from sglang_dllm.upstream import compat
    from sglang_dllm.upstream.launch import (
        fields_of,
        is_known_to_sglang,
        is_of_another_plugin,
    )

    flags = compat.in_effect(server_args)
    algorithm = flags.dllm_algorithm
    fields = fields_of(flags)
    architecture = None if fields is None else architecture_in(fields)
    # A name of ours is ours, as in ``config.server.decodes``.
    is_ours = algorithm in algorithms()
    if fields is None or architecture not in FAMILIES:
        if architecture is None and is_ours:
            explain_unknown_model(flags.model_path)
        elif is_ours and not is_known_to_sglang(algorithm):
            raise refused_model(algorithm, architecture)
        return None
    if not is_ours and is_of_another_plugin(algorithm):
        return None
    require_algorithm(flags, architecture)
    # Here, because SGLang reads the config with transformers next.
    compat.set_flags(server_args, trust_no_checkpoint)
    check_checkpoint(fields, architecture, flags)
    if flags.preferred_sampling_params:
        decode = load_decode_config(
            algorithm, FAMILIES[architecture], flags.dllm_algorithm_config
        )
        vocab_size = with_defaults(fields, architecture)["vocab_size"]
        check_preferred(flags.preferred_sampling_params, decode, vocab_size)
    return architecture


def _handle_model_source_paths(original: Callable[..., Any], server_args: Any) -> None:
    """``handle_model_source_paths``, as a step of SGLang's resolution.

    The steps behind it read the config with transformers, whose errors name no field.
    """
    from sglang_dllm.patches import HOOKS

    original(server_args)
    if HOOKS.problem is None:
        with _ends_in_one_line(server_args):
            _checked(server_args)


def _settle(original: Callable[..., Any], server_args: Any) -> None:
    """``handle_missing_default_values``, as a step of SGLang's resolution."""
    from sglang_dllm.patches import HOOKS

    with _ends_in_one_line(server_args):
        if HOOKS.problem is None:
            _handle_missing_default_values(original, server_args)
        else:
            require_contract(server_args.dllm_algorithm)
            original(server_args)


def _handle_dllm_inference(original: Callable[..., Any], server_args: Any) -> None:
    """``handle_dllm_inference``, as a step of SGLang's resolution.

    SGLang asks its own table of algorithms for the flag's. Ours are not in it: a third
    party's may be called like one of SGLang's. Nothing is left to decide here.
    """
    from sglang_dllm.patches import HOOKS

    if HOOKS.problem is not None:
        original(server_args)
        return
    from sglang.srt.dllm.config import DllmConfig

    from sglang_dllm.config.server import decodes
    from sglang_dllm.upstream import compat
    from sglang_dllm.upstream.launch import architecture_of

    with _ends_in_one_line(server_args):
        flags = compat.in_effect(server_args)
        if decodes(flags.dllm_algorithm, architecture_of(flags)):
            DllmConfig.from_server_args(server_args)
        else:
            original(server_args)
            _require_algorithm(server_args)


def _prepare_server_args(original: Callable[..., Any], argv: list[str]) -> Any:
    from sglang_dllm.config.command_line import CommandLine
    from sglang_dllm.launching.end_note import bad_input
    from sglang_dllm.patches import HOOKS
    from sglang_dllm.upstream import compat

    given = CommandLine.read(argv)
    with _ends_in_one_line():
        if not given.is_ours:
            server_args = original(argv)
        else:
            given.check()
            # SGLang's and transformers' errors about flags and configs.
            with (
                bad_input("", ValueError, AssertionError),
                bad_input(given.subject, OSError),
            ):
                server_args = original(given.known_argv)
                if HOOKS.problem is None:
                    compat.resolve(server_args)
        if HOOKS.problem is not None:
            require_contract(server_args.dllm_algorithm)
            return server_args
        _require_algorithm(server_args)
    return server_args


def _require_algorithm(server_args: Any) -> None:
    """Refuse a model of ours without an algorithm, once SGLang has read its config: a
    repository's too."""
    from sglang_dllm.config.launch_flags import require_algorithm
    from sglang_dllm.models.facts import FAMILIES
    from sglang_dllm.upstream import compat

    config = compat.read_model_config(server_args)
    names = getattr(getattr(config, "hf_config", None), "architectures", None)
    if names and names[0] in FAMILIES:
        require_algorithm(compat.in_effect(server_args), names[0])


@contextmanager
def _ends_in_one_line(server_args: Any = None) -> Iterator[None]:
    """End a launch with one line for an error of ours.

    Args:
        server_args: of a launch that may come from Python, which gets the error itself.
    """
    from sglang_dllm.launching import server
    from sglang_dllm.launching.end_note import WRONG_INPUT, End, one_line
    from sglang_dllm.upstream import compat

    try:
        yield
    except (ConfigError, UpstreamContractError) as error:
        if server_args is not None and not compat.is_command_line(server_args):
            raise
        server.leave(End(WRONG_INPUT, one_line(error)))


def add_resolution_steps() -> None:
    """Add our steps to SGLang's resolution of its flags, where it takes such steps."""
    from sglang_dllm.upstream import compat

    compat.add_resolution_step("handle_model_source_paths", _handle_model_source_paths)
    compat.add_resolution_step("handle_missing_default_values", _settle)
    compat.add_resolution_step("handle_dllm_inference", _handle_dllm_inference)


HOOKS = (
    Hook(
        target="sglang.srt.server_args.ServerArgs._handle_missing_default_values",
        fn=_handle_missing_default_values,
        why="flags get other defaults, or are refused, for whole-canvas prefills",
        contract=("self",),
        remove_when="upstream asks the model for such defaults",
        unless="sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        replaced_by={"0.5.23": "`register_resolution_hook`"},
    ),
    Hook(
        target="sglang.srt.server_args.prepare_server_args",
        fn=_prepare_server_args,
        why="a wrong flag of ours is one line and exit status 2, not a traceback; "
        "flags of d3LLM's launch lines are accepted",
        contract=("argv",),
        remove_when="upstream reports ValueError of flags in one line",
        always=True,
    ),
)
