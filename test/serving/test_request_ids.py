"""A client's ids: one request each, free again at once, never another's prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

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


@pytest.mark.parametrize("rid", [None, "HEALTH_CHECK_1"])
def test_ids_of_sglang_stay(rid: str | None) -> None:
    obj = single(rid)
    with RequestIds().replaced(obj) as names:
        assert names == {} and obj.rid == rid


class Checks:
    def __init__(self) -> None:
        self.ids = RequestIds()
        self.refusals = Refusals(None, ())

    def check_arguments(self, obj: Any) -> None:
        pass

    async def check_forms(self, obj: Any) -> None:
        pass


def test_an_abort_reaches_all_copies_and_no_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks, aborted = Checks(), []
    manager = SimpleNamespace(tokenizer=None)
    monkeypatch.setattr(request_checks, "checks_of", lambda manager: checks)

    async def original(_: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
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
