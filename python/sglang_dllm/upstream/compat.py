"""The differences between the supported versions of SGLang: one function for each.

A function asks which shape SGLang has, never which version it is. So a version between
the two that are tested is served by the shapes that it has. No other module of the
package asks such a question.

SGLang is imported inside of the functions: it makes our platform, which reads this
module, while it is half imported itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.interface import SRTPlatform

Step = Callable[[Callable[[Any], Any], Any], Any]
"""``step(original, server_args)``: a step of SGLang's resolution of its flags, around
SGLang's own."""


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _resolves_later() -> bool:
    """True if ``ServerArgs`` is the user's input, which SGLang resolves in steps."""
    from sglang.srt.server_args import ServerArgs

    return hasattr(ServerArgs, "resolve_once")


def _counts_on_kv() -> bool:
    """True if ``Req.kv`` is always there and holds the counts of slots."""
    from sglang.srt.managers.schedule_batch import ReqKvInfo

    return hasattr(ReqKvInfo, "req_pool_idx")


def _has_extent_range() -> bool:
    """True if ``Req`` has its extent as a range, and its prefix as slots."""
    from sglang.srt.managers.schedule_batch import Req

    return hasattr(Req, "set_extend_range")


# Launch flags


def in_effect(server_args: Any) -> Any:
    """The launch flags as SGLang resolved them so far; to read only.

    0.5.17: the record itself, which resolution writes to. 0.5.23: a view; the record
    keeps what the user gave.
    """
    if not _resolves_later():
        return server_args
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def set_flags(server_args: Any, settle: Callable[[Any], None]) -> None:
    """Let a function of ours read and set flags while SGLang resolves them.

    0.5.17: it gets the record. 0.5.23: the record is sealed; the function gets a proxy
    that SGLang makes for plugins, which declares what is written to it.
    """
    if not _resolves_later():
        settle(server_args)
        return
    from sglang.srt.arg_groups.overrides import record_foreign_defaults

    record_foreign_defaults(server_args, "sglang-dllm", settle)


def flag_defaults(server_args: Any) -> dict[str, Any]:
    """The default of each flag.

    0.5.17: the record is a dataclass. 0.5.23: it is a struct of msgspec.
    """
    kind = type(server_args)
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name: field.default for field in dataclasses.fields(kind)}
    import msgspec

    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def given_flags(server_args: Any) -> dict[str, Any]:
    """The flags that the user gave, with values that are not their defaults.

    0.5.17: the record, early in its resolution; some empty lists and mappings are made
    for each launch. 0.5.23: the record keeps what the user gave.
    """
    given = {
        name: getattr(server_args, name)
        for name, default in flag_defaults(server_args).items()
        if getattr(server_args, name) not in (default, None, False)
    }
    return {name: value for name, value in given.items() if value not in ([], {})}


def add_resolution_step(name: str, step: Step) -> None:
    """Run a step of ours around a named step of SGLang's resolution.

    0.5.17: there is no such place; a hook does it (``patches.server_args``). 0.5.23:
    SGLang's own extension point.
    """
    if not _resolves_later():
        return
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(name)(
        lambda server_args, previous: step(previous, server_args)
    )


def resolve(server_args: Any) -> None:
    """Let SGLang resolve the launch flags now.

    0.5.17: it has, when it made the record. 0.5.23: it would do so a little later.
    """
    if _resolves_later():
        server_args.resolve_once()


def is_command_line(server_args: Any) -> bool:
    """True if the launch was typed, so that its end is one line and an exit status.

    0.5.17: the hook on the reading of a command line sees no other launch. 0.5.23: the
    record says how it was asked for. The Python engine writes its call there.
    """
    if not _resolves_later():
        return True
    command = server_args.launch_command
    return command is not None and not command.startswith("Engine(")


def read_model_config(server_args: Any) -> Any:
    """SGLang's model config, None where it has not read it yet.

    0.5.17: ``model_config`` of the record. 0.5.23: ``_model_config``.
    """
    for name in ("model_config", "_model_config"):
        config = getattr(server_args, name, None)
        if config is not None:
            return config
    return None


def model_config(server_args: Any) -> Any:
    """SGLang's model config, which it reads now if it has not yet.

    0.5.17: a method of the record. 0.5.23: a function.
    """
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def device_mebibytes(device: str) -> float | None:
    """The memory of a device; None where it is not known."""
    from sglang.srt.utils import get_device_memory_capacity

    found: float | None = get_device_memory_capacity(device)
    return found


# Answers


def responses_have_logprobs() -> bool:
    """True if an answer of /v1/responses has a place for log-probabilities.

    0.5.17: SGLang leaves it empty. 0.5.23: it fills it, in answers that are no stream.
    """
    from sglang.srt.entrypoints.openai import serving_responses

    return hasattr(serving_responses, "_build_output_text_logprobs")


def messages_have_formats() -> bool:
    """True if a request of /v1/messages has a place for the form of its answer.

    0.5.17: it has none. 0.5.23: ``output_config.format``.
    """
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicOutputConfig

    return "format" in AnthropicOutputConfig.model_fields


def messages_have_strict_tools() -> bool:
    """True if a tool of /v1/messages may be strict.

    0.5.17: SGLang drops the field. 0.5.23: it has it.
    """
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicCustomTool

    return "strict" in AnthropicCustomTool.model_fields


# Requests and their slots


def hold_slots(req: Any, num_tokens: int) -> None:
    """Note on a request that it holds so many KV slots.

    0.5.17: the request has the counts, and its ``ReqKvInfo`` is made here. 0.5.23: the
    ``ReqKvInfo`` is always there and has them.
    """
    if _counts_on_kv():
        req.kv.kv_allocated_len = req.kv.kv_committed_len = num_tokens
    else:
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        req.kv = ReqKvInfo(kv_allocated_len=num_tokens, swa_evicted_seqlen=0)
        req.kv_committed_len = num_tokens


def clear_prefix(req: Any) -> None:
    """Note on a request that none of its tokens is a shared prefix.

    0.5.17: the prefix is a tensor of slots. 0.5.23: a number.
    """
    if _has_extent_range():
        req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    else:
        req.prefix_len = 0


def set_extent(req: Any, num_tokens: int) -> None:
    """Note on a request that a round computes all of its tokens.

    0.5.17: as a range. 0.5.23: as its end, behind the shared prefix.
    """
    if _has_extent_range():
        req.set_extend_range(0, num_tokens)
    else:
        req.extend_end = num_tokens


def release_slots(req: Any, tree_cache: Any) -> None:
    """Free the request slot and the KV slots of a request; no prefix is kept.

    0.5.17: the argument is called ``is_insert``. 0.5.23: ``checkpoint``.
    """
    from sglang.srt.mem_cache.common import release_kv_cache

    if _takes(release_kv_cache, "checkpoint"):
        release_kv_cache(req, tree_cache, checkpoint=False)
    else:
        release_kv_cache(req, tree_cache, is_insert=False)


def report_round(reporter: Any, in_graph: bool, batch: Any, num_tokens: int) -> None:
    """Report a round to SGLang's metrics and log.

    0.5.17: SGLang counts a token for each request, and those that we add. 0.5.23: it
    counts those that we name.

    Args:
        num_tokens: new tokens of the round.
    """
    if _takes(reporter.report_decode_stats, "num_generated_tokens"):
        reporter.report_decode_stats(
            in_graph, running_batch=batch, num_generated_tokens=num_tokens
        )
    else:
        more = num_tokens - len(batch.reqs)
        reporter.report_decode_stats(
            in_graph, running_batch=batch, num_correct_drafts=more
        )


# Ranks


def data_parallel_rank(scheduler: Any) -> int:
    """The number of a scheduler among data-parallel ones; 0 without them.

    0.5.17: the scheduler keeps its ranks. 0.5.23: the context of its process does.
    """
    from sglang.srt.runtime_context import get_parallel

    ranks: Any = getattr(scheduler, "ps", None) or get_parallel()
    return ranks.dp_rank or 0


def num_thread_bindings(server_args: Any) -> int:
    """The entries that SGLang expects in ``SGLANG_CPU_OMP_THREADS_BIND``.

    0.5.17: one for each tensor-parallel rank. 0.5.23: one for each process.
    """
    from sglang.srt.utils.numa_utils import init_threads_binding

    tp_size: int = server_args.tp_size
    if _takes(init_threads_binding, "world_size"):
        return tp_size * int(server_args.dp_size)
    return tp_size


def keep_nccl_away() -> None:
    """Let the ranks of a platform without CUDA talk through gloo alone.

    0.5.17: SGLang opens NCCL wherever it finds the library, which a CUDA build of torch
    brings, and then needs a CUDA device. Without the library it goes on with gloo; so
    we name one that is not there. 0.5.23: the platform's capabilities say no.
    """
    if not hasattr(SRTPlatform, "capabilities"):
        os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no-nccl-on-a-cpu")


def timeouts_are_shared() -> bool:
    """True if all ranks end a request for its timeout in the same round.

    0.5.17: each rank asks its own clock. 0.5.23: one rank's clock decides.
    """
    from sglang.srt.managers.scheduler import Scheduler

    return hasattr(Scheduler, "_poll_timeout_aborts")


def is_update_open(updater: Any) -> bool:
    """True in the middle of an update of the weights that comes in many calls.

    0.5.17: SGLang does not know of such updates. 0.5.23: they are sessions.

    Args:
        updater: the scheduler's.
    """
    return getattr(updater, "_session", None) is not None


# Platform


def register_operator(
    layer: type, forward: Callable[..., Any], platform_key: str
) -> None:
    """Make a layer of SGLang use a forward of ours on our platform.

    0.5.17: ``MultiPlatformOp`` holds the table. 0.5.23: ``BaseFusedOp``.
    """
    from sglang.kernels.fused_op import BaseFusedOp

    if hasattr(BaseFusedOp, "register_oot_forward"):
        BaseFusedOp.register_oot_forward(layer, forward, platform_key)
        return
    from sglang.srt.layers.utils.multi_platform import MultiPlatformOp

    MultiPlatformOp.register_oot_forward(layer, forward, platform_key)


class PlatformPools(SRTPlatform):
    """A platform whose KV pool and allocator are SGLang's own, on plain torch.

    0.5.17: a platform must name both. 0.5.23: SGLang takes these where the platform
    says that it has no Triton, which is the default.
    """

    if not hasattr(SRTPlatform, "get_kv_pool_cls"):

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator
