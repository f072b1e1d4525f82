"""A client's ids: one request each, free again at once, never another's prefix."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from helpers.off_arguments import tokenized
from sglang_dllm.config.refusals import Refusals
from sglang_dllm.patches import tokenizer_manager
from sglang_dllm.serving import request_checks
from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.request_ids import RequestIds


def single(rid: Any, **fields: Any) -> GenerateReqInput:
    return GenerateReqInput(text="a", rid=rid, **fields)


def test_an_id_begins_no_other_one_and_can_be_used_again() -> None:
    ids, found = RequestIds(), []
    for rid in ("job-1", "job-10", "job-1"):
        with ids.replaced(single(rid)) as names:
            (ours,) = names
            assert names[ours] == rid and ids.sglang_ids(rid) == [ours]
            found.append(ours)
        assert ids.sglang_ids(rid) == [rid]
    pairs = [(a, b) for a in found for b in found if a is not b]
    assert not any(b.startswith(a) for a, b in pairs)


@pytest.mark.parametrize(
    ("rid", "clients", "all_of"),
    [("job", ["job_0", "job_1"], "job"), (["x", "y"], ["x", "y"], None)],
)
def test_a_batch_has_an_id_for_each_prompt(
    rid: Any, clients: list[str], all_of: str | None
) -> None:
    ids, obj = RequestIds(), GenerateReqInput(text=["a", "b"], rid=rid)
    with ids.replaced(obj) as names:
        assert list(names.values()) == clients and obj.rid == list(names)
        assert [ids.sglang_ids(one) for one in clients] == [[one] for one in names]
        if all_of is not None:
            assert ids.sglang_ids(all_of) == list(names)


def test_a_running_id_is_refused_and_the_first_keeps_it() -> None:
    ids = RequestIds()
    with ids.replaced(single("a")) as names:
        for rid in ("a", ["b", "a"]):
            obj = GenerateReqInput(text=["a"] * len(rid), rid=rid)
            with pytest.raises(BadRequest, match="rid='a'"), ids.replaced(obj):
                pass
            with pytest.raises(BadRequest, match="rid='a'"):
                ids.check_unused(rid)
        assert ids.sglang_ids("a") == list(names)
        assert ids.sglang_ids("b") == ["b"]


def test_an_id_twice_in_one_batch_is_refused() -> None:
    obj = GenerateReqInput(text=["a", "b"], rid=["x", "x"])
    with pytest.raises(BadRequest, match="another id"), RequestIds().replaced(obj):
        pass


def test_ids_of_health_checks_stay() -> None:
    obj = single("HEALTH_CHECK_1")
    with RequestIds().replaced(obj) as names:
        assert names == {} and obj.rid == "HEALTH_CHECK_1"


def test_a_request_without_an_id_gets_one_as_sglang_makes_them() -> None:
    for obj, num in ((single(None), 1), (GenerateReqInput(text=["a", "b"]), 2)):
        with RequestIds().replaced(obj) as names:
            rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
            assert names == {} and len(set(rids)) == num
            assert all(re.fullmatch("[0-9a-f]{32}", rid) for rid in rids)


class Checks:
    def __init__(self) -> None:
        self.ids = RequestIds()
        self.refusals = Refusals(None, ())
        self.may_read = asyncio.Event()
        self.may_read.set()

    def check_arguments(self, obj: Any) -> None:
        pass

    async def check_forms(self, obj: Any) -> bool:
        await self.may_read.wait()
        return True


def test_an_abort_reaches_all_copies_and_no_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks, aborted = Checks(), []
    manager = SimpleNamespace(tokenizer=None)
    monkeypatch.setattr(request_checks, "checks_of", lambda manager: checks)

    async def original(_: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        assert not any(map(checks.ids.sent, obj.rid))
        yield [{"meta_info": {"id": rid}} for rid in obj.rid]

    def abort(_: Any, rid: str, abort_all: bool) -> None:
        aborted.append((rid, abort_all))

    async def run() -> None:
        batch = GenerateReqInput(text=["a", "b"], rid="job-1")
        neighbour = GenerateReqInput(text=["a", "b"], rid="job-10")
        for obj in (batch, neighbour):
            answers = tokenizer_manager._generate_request(original, manager, obj)
            kept.append(answers)
            (first, second) = await anext(answers)
            public = [first["meta_info"]["id"], second["meta_info"]["id"]]
            assert public == [f"{obj.rid[0][33:]}", f"{obj.rid[1][33:]}"]
        tokenizer_manager._abort_request(abort, None, "job-1")
        assert aborted == [(rid, False) for rid in batch.rid]
        tokenizer_manager._abort_request(abort, None, "", True)
        assert aborted[-1] == ("", True)
        for answers in kept:
            await answers.aclose()
        assert checks.ids.sglang_ids("job-1") == ["job-1"]

    kept: list[Any] = []
    asyncio.run(run())


class Client:
    """The request of HTTP, as far as SGLang asks it."""

    def __init__(self) -> None:
        self.is_gone = False

    async def is_disconnected(self) -> bool:
        return self.is_gone


class Manager:
    """The tokenizer manager between the hooks: it sends, and hears of aborts."""

    tokenizer = None

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.messages: list[tuple[str, str]] = []

    async def generate_request(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
        await asyncio.sleep(0)
        for rid in rids:
            request = tokenized(rid)
            tokenizer_manager._dispatch_to_scheduler(Manager.send, self, request)
        yield [{"meta_info": {"id": rid, "finish_reason": None}} for rid in rids]

    def send(self, obj: Any) -> None:
        self.messages.append(("send", obj.rid))

    def abort(self, rid: str, abort_all: bool) -> None:
        self.messages.append(("abort all" if abort_all else "abort", rid))

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        tokenizer_manager._abort_request(Manager.abort, self, rid, abort_all)


EARLY = ["arriving", "reading"]
"""A request of HTTP whose body is checked, and one whose form is read once more."""


@pytest.mark.parametrize("when", EARLY)
@pytest.mark.parametrize(
    ("rid", "aborted", "wanted"),
    [
        ("job", "job", [True, True]),
        ("job", "job_1", [False, True]),
        (["x", "y"], "x", [True, False]),
        (["x", "y"], "xy", [False, False]),
        ("job", None, [True, True]),
        (None, None, [True, True]),
        (None, "gone", [True, True]),
    ],
)
def test_an_early_abort_follows_its_request(
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    rid: Any,
    aborted: str | None,
    wanted: list[bool],
) -> None:
    """``aborted``: an id, None for all of them, ``gone`` for a client that hung up."""
    monkeypatch.setattr(request_checks, "checks_of", lambda manager: manager.checks)

    async def run() -> None:
        checks, client = Checks(), Client()
        manager = Manager(checks)
        checks.may_read.clear()

        def end() -> None:
            client.is_gone = aborted == "gone"
            if aborted != "gone":
                manager.abort_request(aborted or "", abort_all=aborted is None)

        async def answer() -> None:
            checks.ids.arrive()
            arrived.set()
            await may_go_on.wait()
            obj = GenerateReqInput(text=["a", "b"], rid=rid)
            answers = tokenizer_manager._generate_request(
                Manager.generate_request, manager, obj, client
            )
            async for _ in answers:
                pass

        arrived, may_go_on = asyncio.Event(), asyncio.Event()
        answering = asyncio.create_task(answer())
        await arrived.wait()
        if when == "reading":
            may_go_on.set()
            while not checks.ids._is_aborted:
                await asyncio.sleep(0)
        end()
        may_go_on.set()
        checks.may_read.set()
        await answering
        sent = [one for kind, one in manager.messages if kind == "send"]
        for one, is_aborted in zip(sent, wanted, strict=True):
            at = manager.messages.index(("send", one))
            assert (("abort", one) in manager.messages[at:]) is is_aborted
        assert not checks.ids._is_aborted and not checks.ids._arriving
        assert ("abort all", "") in manager.messages or aborted is not None

    asyncio.run(run())
