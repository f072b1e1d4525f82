"""sglang.srt.managers.scheduler

Upstream: a pause begins between two forwards, and weights may be updated during it. The
internal state of a scheduler has launch flags and sizes. Grammars mask the next token.
A full queue refuses single prompts.
Ours: a forward may be in flight between two rounds; it is committed before the pause.
The internal state has the active canvases too (``runtime.state``). Forms of answers are
compiled to automata (``runtime.forms``). The queue of a server is bounded in its
launching process (``launching.queue_bound``).
Goes when: upstream lets a dLLM algorithm finish its work before a pause, and lets it
add to the internal state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.patches.dllm_scheduler import is_ours
from sglang_dllm.upstream.hooks import Hook


def _pause_generation(
    original: Callable[..., Any], scheduler: Any, recv_req: Any
) -> Any:
    if not is_ours(scheduler):
        return original(scheduler, recv_req)
    from sglang_dllm.runtime.rounds import before_pause

    before_pause(scheduler)
    return original(scheduler, recv_req)


def _get_internal_state(
    original: Callable[..., Any], scheduler: Any, recv_req: Any
) -> Any:
    found = original(scheduler, recv_req)
    if is_ours(scheduler):
        from sglang_dllm.runtime.state import STATE_KEY, state_of

        found.internal_state[STATE_KEY] = state_of(scheduler)
    return found


def _init_grammar_manager(original: Callable[..., Any], scheduler: Any) -> Any:
    result = original(scheduler)
    if is_ours(scheduler):
        from sglang_dllm.runtime.forms import use_automata
        from sglang_dllm.runtime.rounds import engine_of

        use_automata(scheduler, engine_of(scheduler).facts)
    return result


def _abort_on_queued_limit(
    original: Callable[..., Any], scheduler: Any, recv_req: Any
) -> Any:
    from sglang_dllm.launching.end_note import EndNote

    if is_ours(scheduler) and EndNote.of_this_server() is not None:
        # The launching process has bounded the queue before it took the request.
        return False
    return original(scheduler, recv_req)


HOOKS = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._abort_on_queued_limit",
        fn=_abort_on_queued_limit,
        why="a full queue is met behind the HTTP answer's begin: a stream is answered "
        "with 200, a request of many prompts is cut in two, and a retracted request "
        "is lost",
        contract=("self", "recv_req"),
        remove_when="upstream bounds the queue before it takes a request",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_grammar_manager",
        fn=_init_grammar_manager,
        why="upstream's grammars mask the next token of a left-to-right answer; masks "
        "of a canvas are filled in any order",
        contract=("self",),
        remove_when="upstream lets a dLLM algorithm bring its own grammar backend",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.pause_generation",
        fn=_pause_generation,
        why="a forward that is in flight across an update of the weights would join "
        "hidden states of the old model with the head of the new one",
        contract=("self", "recv_req"),
        remove_when="upstream lets a dLLM algorithm finish its work before a pause",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        fn=_get_internal_state,
        why="the process that answers HTTP cannot see which canvases are active, and "
        "how far they are",
        contract=("self", "recv_req"),
        remove_when="upstream lets a dLLM algorithm add to the internal state",
    ),
)
