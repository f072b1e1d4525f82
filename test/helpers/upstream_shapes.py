"""The objects of SGLang that tests build, in the shape that the installed version has.

The package asks such questions in ``sglang_dllm.upstream.compat`` alone, and the tests
ask theirs here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.server_args import ServerArgs

from sglang_dllm.config.launch_flags import settle_launch_flags
from sglang_dllm.upstream.compat import (
    flag_defaults,
    given_flags,
    in_effect,
    set_flags,
)

RESOLVES_LATER = hasattr(ServerArgs, "resolve_once")
"""Whether SGLang resolves the flags after it has made the record of them."""

HAS_PLAIN_GPTQ = "gptq" in QUANTIZATION_METHODS
"""Whether SGLang computes GPTQ without Marlin's kernels."""

SDAR = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 151_680,
}
"""The config of a block-causal dLLM that SGLang serves itself."""


def raw_args(**fields: object) -> Any:
    """ServerArgs as the user gave them, before SGLang derives anything."""
    fields.setdefault("model_path", "none")
    if RESOLVES_LATER:
        return ServerArgs(**fields)
    args = object.__new__(ServerArgs)
    for name, value in {**flag_defaults(args), **fields}.items():
        object.__setattr__(args, name, value)
    return args


def settled(args: Any, architecture: str = "LLaDAModelLM") -> Any:
    """The flags after our function has settled them, as a launch lets it do."""
    given = given_flags(args)
    set_flags(args, lambda flags: settle_launch_flags(flags, architecture, given))
    return in_effect(args)


def cuda_graph_config(args: Any) -> Any:
    """SGLang's own graphs, as it derives them from settled flags."""
    if RESOLVES_LATER:
        from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config

        parse_cuda_graph_config(args)
    else:
        args._parse_cuda_graph_config()
    return in_effect(args).cuda_graph_config


def resolve_first_step(args: Any) -> None:
    """Run the step of SGLang's resolution around which ours runs."""
    if RESOLVES_LATER:
        from sglang.srt.arg_groups.resolution_hooks import run_hook
        from sglang.srt.arg_groups.serving_hook import handle_missing_default_values

        run_hook(handle_missing_default_values, args)
    else:
        args._handle_missing_default_values()


def resolve(argv: list[str]) -> Any:
    """Read a command line and resolve its flags, as a launch does."""
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(argv)
    if RESOLVES_LATER:
        args.resolve_once()
    return in_effect(args)


def retract(req: Req, scheduler: Any) -> None:
    """SGLang's own retraction of a running request."""
    from sglang.srt.managers.schedule_batch import release_req

    more = {} if RESOLVES_LATER else {"server_args": SimpleNamespace(**_NOT_SPLIT)}
    release_req(
        req=req,
        remaing_req_count=1,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
        **more,
    )


_NOT_SPLIT = {"disaggregation_mode": "null"}


def mark_overdue(scheduler: Any) -> None:
    """SGLang's own check of SGLANG_REQ_RUNNING_TIMEOUT marks running requests."""
    from sglang.srt.managers.scheduler import Scheduler

    running = scheduler.running_batch
    if not RESOLVES_LATER:
        Scheduler._abort_on_running_timeout(scheduler, running)
        return
    other_queues = SimpleNamespace(
        pop_aborted_reqs=lambda *which: [], abort_requests=lambda abort: None
    )
    found = SimpleNamespace(
        waiting_queue=[],
        chunked_req=None,
        mm_receiver=None,
        dllm_config=None,
        grammar_manager=other_queues,
        disaggregation_mode=None,
        _collect_inflight_batches=lambda: [running],
        collect_inflight_reqs=lambda: set(running.reqs),
    )
    for abort in Scheduler._poll_timeout_aborts(found):
        Scheduler.abort_request(found, abort)


def request_slot(req: Req) -> int | None:
    """The index of a request in SGLang's table of requests."""
    holder: Any = req.kv if hasattr(req.kv, "req_pool_idx") else req
    index: int | None = holder.req_pool_idx
    return index
