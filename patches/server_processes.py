"""sglang.srt: how the processes of a server start and end

Upstream: a child that fails sends a signal, and the launching process kills the tree
and itself. The reason stays in the middle of the log, and the exit status is that of
SIGKILL. ``/health`` generates a token. SIGTERM does not refuse new requests. The port
is taken once the model is loaded.
Ours: a server of a full-attention model has one object in the launching process
(``launching.server``), which the hooks here tell of the start, of signals and of the
end. Errors of ours and of a checkpoint end the launch with one line.
Goes when: upstream reports why a child failed and drains before it exits.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_dllm.errors import ConfigError, UpstreamContractError
from sglang_dllm.upstream.hooks import Hook


def _launch_server(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    from sglang_dllm.config.server import decodes
    from sglang_dllm.upstream import compat
    from sglang_dllm.upstream.launch import architecture_of

    flags = compat.in_effect(server_args)
    if not decodes(flags.dllm_algorithm, architecture_of(flags)):
        return original(server_args, *args, **kwargs)
    from sglang_dllm.launching import server
    from sglang_dllm.launching.detokenizer import run_detokenizer
    from sglang_dllm.launching.end_note import (
        FAILURE,
        INTERRUPTED,
        WRONG_INPUT,
        End,
        one_line,
    )

    launch = server.begin()
    try:
        launch.take_sigterm()
        _before_launch(launch, server_args, flags)
        if not args:
            kwargs.setdefault("init_tokenizer_manager_func", _init_tokenizer_manager)
            kwargs.setdefault("run_detokenizer_process_func", run_detokenizer)
        result = original(server_args, *args, **kwargs)
    except (ConfigError, UpstreamContractError) as error:
        launch.end(launch.why() or End(WRONG_INPUT, one_line(error)))
        raise
    except KeyboardInterrupt:
        launch.end(End(INTERRUPTED, "interrupted before the server was ready"))
        raise
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        launch.end()
        raise
    except Exception as error:
        end = launch.why()
        if end is None:
            traceback.print_exc()
            kind = type(error).__name__
            reason = f"the launching process failed: {kind}: {one_line(error)}"
            end = End(FAILURE, reason)
        launch.end(end)
        raise
    server.finish()
    return result


def _before_launch(launch: Any, server_args: Any, flags: Any) -> None:
    """Meet what would fail half a minute later, and keep the way to the end short."""
    from sglang.srt.entrypoints.http_server import app, get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    from sglang_dllm.config.launch_flags import most_queued
    from sglang_dllm.launching.address import check_address
    from sglang_dllm.launching.doorkeeper import Doorkeeper
    from sglang_dllm.launching.end_note import bad_input
    from sglang_dllm.launching.queue_bound import QueueBound
    from sglang_dllm.serving.routes import QUEUED

    check_address(flags.host, flags.port)
    # SGLang checks again, in a place where an error is a traceback.
    with bad_input("", AssertionError, ValueError):
        server_args.check_server_args()
    if os.environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP") != "1":
        # SGLang would wait a minute for a dump that CUDA does not write then.
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "false")
    if not flags.skip_tokenizer_init:
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        path = flags.tokenizer_path or flags.model_path
        # A detokenizer that fails too would add its traceback to the launch's end.
        with bad_input(f"no tokenizer can be loaded from {path}", Exception):
            get_tokenizer(
                path,
                tokenizer_mode=flags.tokenizer_mode,
                trust_remote_code=flags.trust_remote_code,
                tokenizer_revision=flags.revision,
            )

    def is_up() -> bool:
        state = get_global_state()
        return (
            state is not None
            and not state.tokenizer_manager.gracefully_exit
            and state.tokenizer_manager.server_status == ServerStatus.Up
        )

    app.add_middleware(
        Doorkeeper,
        launch=launch,
        is_up=is_up,
        on_startup=partial(_on_startup, launch, flags.host, flags.port),
        queue=QueueBound(most_queued(flags), _num_in_flight, _load),
        queued_paths=QUEUED,
        on_refusal=_on_refusal,
    )


def _on_startup(launch: Any, host: str, port: int) -> None:
    """Take the signals in the event loop; uvicorn has set its own handlers by now."""
    import asyncio
    import signal

    from sglang_dllm.launching.address import check_address
    from sglang_dllm.launching.end_note import WRONG_INPUT, End, one_line

    try:
        # Somebody may have taken the port while the model was loaded. uvicorn would
        # end only when SGLang's first request has timed out.
        check_address(host, port)
    except ConfigError as error:
        launch.end(End(WRONG_INPUT, one_line(error)))
    from sglang.srt.entrypoints.http_server import get_global_state

    launch.watch.complete()
    launch.started()
    state = get_global_state()
    # SGLang would do so at the first request, and die of a SIGTERM before it.
    state.tokenizer_manager.auto_create_handle_loop()
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGINT, _on_signal, launch, state.tokenizer_manager, signal.SIGINT
    )


def _num_in_flight() -> int:
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    return 0 if state is None else len(state.tokenizer_manager.rid_to_state)


def _load() -> Any:
    """The load that the schedulers have published last."""
    from sglang.srt.entrypoints.http_server import get_global_state

    from sglang_dllm.launching.queue_bound import Load

    state = get_global_state()
    if state is None:
        return Load()
    ranks = state.tokenizer_manager.load_snapshot_reader.read_all()
    return Load(
        places=sum(rank.max_running_requests for rank in ranks),
        running=sum(rank.num_running_reqs for rank in ranks),
        waiting=sum(rank.num_waiting_reqs for rank in ranks),
        waiting_tokens=sum(
            rank.num_total_tokens - rank.num_used_tokens for rank in ranks
        ),
    )


def _on_refusal(stage: str) -> None:
    from sglang_dllm.serving.request_checks import checks_of_server

    checks = checks_of_server()
    if checks is not None:
        checks.refusals.add(stage)


def _on_signal(launch: Any, manager: Any, number: int) -> None:
    # /ready and SGLang's own end ask this field.
    manager.gracefully_exit = True
    launch.on_signal(number)


def _init_tokenizer_manager(server_args: Any, port_args: Any) -> Any:
    from sglang.srt.entrypoints.engine import init_tokenizer_manager

    from sglang_dllm.launching.end_note import bad_input

    # A wrong chat template is an error of any class.
    with bad_input("tokenizer or chat template", OSError, ValueError, RuntimeError):
        return init_tokenizer_manager(server_args, port_args)


def _sigterm_handler(
    original: Callable[..., Any], handler: Any, signum: Any = None, frame: Any = None
) -> Any:
    import signal

    from sglang_dllm.launching import server

    launch = server.current()
    if launch is None:
        return original(handler, signum, frame)
    _on_signal(launch, handler.tokenizer_manager, signal.SIGTERM)
    return None


async def _sigterm_watchdog(original: Callable[..., Any], manager: Any) -> Any:
    from sglang_dllm.launching import server

    launch = server.current()
    if launch is not None:
        # SGLang looks every five seconds whether a request is left, and would end
        # while the last bytes of its answer are on their way.
        await launch.drained()
    return await original(manager)


def _kill_process_tree(
    original: Callable[..., Any],
    parent_pid: int | None,
    include_parent: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from sglang_dllm.launching import server

    if server.has_left() and parent_pid == os.getpid():
        # Nothing has been started, and SGLang would log a line behind the last one.
        return None
    launch = server.current()
    if launch is not None and include_parent and parent_pid == os.getpid():
        launch.end()
        return None
    return original(parent_pid, include_parent, *args, **kwargs)


def _scheduler_init(
    original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    from sglang_dllm.launching.end_note import reported

    with reported("the scheduler"):
        return original(scheduler, *args, **kwargs)


def _run_event_loop(original: Callable[..., Any], scheduler: Any) -> Any:
    from sglang_dllm.launching.end_note import reported

    with reported("the scheduler"):
        return original(scheduler)


def _load_model(original: Callable[..., Any], runner: Any) -> Any:
    from sglang_dllm.launching.end_note import EndNote, bad_input

    if EndNote.of_this_server() is None:
        return original(runner)
    # Loaders raise these for a tensor of another shape and for a broken file.
    kinds = (OSError, ValueError, RuntimeError, AssertionError)
    path = runner.model_config.model_path
    with bad_input(f"cannot load {path}", *kinds, *_file_errors()):
        return original(runner)


def _file_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (SafetensorError,)


_HTTP = "sglang.srt.entrypoints.http_server"
_MANAGER = "sglang.srt.managers.tokenizer_manager"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_WHY_CHILD = "the launching process is told that a child failed, but not why"
_UNTIL_CHILD = "upstream sends the error of a child to the launching process"

HOOKS = (
    Hook(
        target=f"{_HTTP}.launch_server",
        fn=_launch_server,
        why="a taken port is found after the model is loaded; errors of the launch "
        "are tracebacks; `/health` generates a token",
        contract=(
            "server_args",
            "init_tokenizer_manager_func",
            "run_scheduler_process_func",
            "run_detokenizer_process_func",
            "execute_warmup_func",
            "launch_callback",
        ),
        remove_when="upstream checks the port first, reports errors in one line and "
        "has a `/health` that answers at once",
    ),
    Hook(
        target="sglang.srt.utils.common.kill_process_tree",
        fn=_kill_process_tree,
        why="the launching process kills itself: its status is 137 after a drain and "
        "after a failure, and the reason is not the last line",
        contract=("parent_pid", "include_parent", "skip_pid", "wait_timeout"),
        remove_when="upstream exits with a status and a reason",
    ),
    Hook(
        target=f"{_MANAGER}.SignalHandler.sigterm_handler",
        fn=_sigterm_handler,
        why="new requests are taken during the drain, and a second signal is ignored",
        contract=("self", "signum", "frame"),
        remove_when="upstream refuses new requests during the drain",
    ),
    Hook(
        target=f"{_MANAGER}.TokenizerManager.sigterm_watchdog",
        fn=_sigterm_watchdog,
        why="the end may come before the last bytes of an answer have left",
        contract=("self",),
        remove_when="upstream waits for its HTTP answers",
    ),
    Hook(
        target=f"{_SCHEDULER}.__init__",
        fn=_scheduler_init,
        why=_WHY_CHILD,
        contract=None,
        remove_when=_UNTIL_CHILD,
    ),
    Hook(
        target=f"{_SCHEDULER}.run_event_loop",
        fn=_run_event_loop,
        why=_WHY_CHILD,
        contract=("self",),
        remove_when=_UNTIL_CHILD,
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        fn=_load_model,
        why="a wrong checkpoint is an error of any class, with a traceback",
        contract=("self",),
        remove_when="upstream has an error class for wrong checkpoints",
    ),
)
