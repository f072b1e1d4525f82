"""sglang.srt.managers.tokenizer_manager

Upstream: checks lengths only. A token id outside the vocabulary ends the scheduler.
Sampling fields that its dLLMs ignore pass without a word. An abort ends every request
whose id begins with the named one, and is lost if the request is not sent to a
scheduler yet; n answers share one seed.
Ours: a request is checked before it is queued, and its options are resolved
(``serving.request_checks``). Each of n answers is a request of its own
(``serving.copies``), under an id of its own (``serving.request_ids``), which keeps an
early abort until its request is sent. The best of several answers may come back alone
(``serving.best_of``). The denoising report of a response becomes plain fields of its
meta_info (``runtime.report``), and so do the history of a watched canvas
(``serving.watched``) and the filled gaps of a canvas that the request gave in part
(``serving.gaps``), whose tokens are counted then.
Goes when: upstream has a per-model request validator and scalar customized_info, and
its aborts name one request, sent or not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _validate_one_request(
    original: Callable[..., Any], self: Any, obj: Any, input_ids: Any
) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self)
    if checks is not None and isinstance(obj, GenerateReqInput):
        with checks.refusals.counted("prompt"):
            checks.check_prompt(obj.sampling_params, input_ids)
    return original(self, obj, input_ids)


async def _generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self)
    if checks is None or not isinstance(obj, GenerateReqInput):
        async for out in original(self, obj, request):
            yield out
        return
    from sglang_dllm.launching.queue_bound import ENTRY
    from sglang_dllm.runtime.report import final_gaps, into_meta_info
    from sglang_dllm.serving.best_of import BestAnswers
    from sglang_dllm.serving.gaps import GapAnswers
    from sglang_dllm.serving.watched import EXTENSION, WatchedAnswers, extension_of

    entry, best = ENTRY.get(), BestAnswers(obj)
    with checks.refusals.counted("arguments"):
        checks.check_arguments(obj)
    gaps, watched = GapAnswers(self, obj), WatchedAnswers(self.tokenizer)
    with checks.ids.replaced(obj) as client_ids:
        with checks.refusals.counted("arguments"):
            has_form = await checks.check_forms(obj)
        if has_form and await _has_hung_up(request, obj):
            for rid in obj.rid if isinstance(obj.rid, list) else [obj.rid]:
                checks.ids.abort(rid)
        if entry is not None:
            entry.arrive()
        async for out in original(self, obj, request):
            for response in out if isinstance(out, list) else [out]:
                meta_info = response["meta_info"]
                new_gaps = gaps.add(response, final_gaps(meta_info))
                watched.add(meta_info, into_meta_info(meta_info))
                if entry is not None and meta_info["finish_reason"] is not None:
                    entry.ended(meta_info.get("canvas_len", 0))
                if new_gaps is not None:
                    meta_info["dllm"] = {**meta_info.get("dllm", {}), "gaps": new_gaps}
                EXTENSION.set(extension_of(meta_info))
                meta_info["id"] = client_ids.get(meta_info["id"], meta_info["id"])
            yield best.of(out)


async def _has_hung_up(request: Any, obj: Any) -> bool:
    """True if the client is gone. SGLang would look for the first time in seconds."""
    is_awaited = request is not None and not obj.background
    return is_awaited and await request.is_disconnected()


def _dispatch_to_scheduler(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    from sglang.srt.managers.io_struct import (
        BatchTokenizedGenerateReqInput,
        TokenizedGenerateReqInput,
    )

    from sglang_dllm.serving.request_checks import checks_of

    found = original(self, obj)
    if isinstance(obj, TokenizedGenerateReqInput):
        sent: Iterable[Any] = [obj]
    elif isinstance(obj, BatchTokenizedGenerateReqInput):
        sent = obj
    else:
        return found
    checks = checks_of(self)
    if checks is not None:
        for one in sent:
            if checks.ids.sent(one.rid):
                self.abort_request(one.rid)
    return found


def _abort_request(
    original: Callable[..., Any], self: Any, rid: str = "", abort_all: bool = False
) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    checks = checks_of(self)
    if checks is None:
        return original(self, rid, abort_all)
    if abort_all:
        checks.ids.abort_all()
        return original(self, rid, abort_all)
    for one in checks.ids.abort(rid):
        original(self, one, abort_all)
    return None


def _create_abort_task(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    if checks_of(self) is not None and not hasattr(obj, "is_single"):
        # SGLang sets it when it looks at the prompts. A client may be gone by then.
        obj.is_single = not isinstance(obj.rid, list)
    return original(self, obj)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS = (
    Hook(
        target=f"{_MANAGER}._validate_one_request",
        fn=_validate_one_request,
        why="requests that the scheduler could not survive, or whose fields it would "
        "ignore, are refused before they are queued",
        contract=("self", "obj", "input_ids"),
        remove_when="upstream has a per-model request validator",
    ),
    Hook(
        target=f"{_MANAGER}.generate_request",
        fn=_generate_request,
        why="sampling parameters are used before they are checked; customized_info "
        "carries lists of one value per token only; n answers share one seed",
        contract=("self", "obj", "request"),
        remove_when="upstream has a per-model request validator and carries scalars "
        "of a request to meta_info",
    ),
    Hook(
        target=f"{_MANAGER}._dispatch_to_scheduler",
        fn=_dispatch_to_scheduler,
        why="an abort that comes before its request is sent is lost",
        contract=("self", "obj"),
        remove_when="upstream keeps an abort until its request is sent",
    ),
    Hook(
        target=f"{_MANAGER}.abort_request",
        fn=_abort_request,
        why="an abort ends every request whose id begins with the named one, and a "
        "later request that has the id again",
        contract=("self", "rid", "abort_all"),
        remove_when="upstream aborts the named request alone",
    ),
    Hook(
        target=f"{_MANAGER}.create_abort_task",
        fn=_create_abort_task,
        why="the task of a stream whose client left while a form was read fails with "
        "an AttributeError",
        contract=("self", "obj"),
        remove_when="upstream's task reads no attribute that is set later",
    ),
)
