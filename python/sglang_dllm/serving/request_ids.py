"""The ids of requests: a client's, and the one under which SGLang knows a request.

SGLang aborts every request whose id begins with the named one, and a stream's id two
seconds after its end, whoever has it by then. So each request gets an id of its own
here. No such id begins another one, and none is used twice.

SGLang sends an abort to the schedulers at once. One that comes before its request is
sent, such as while a form is read, would be lost. It is kept here until then.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from sglang_dllm.serving.bad_request import refused

_OURS = re.compile(r"^[0-9a-f]{32}-")


@dataclass(eq=False)
class _Arrival:
    """A request of HTTP before SGLang knows it, and the aborts that came meanwhile.

    Attributes:
        named: the ids that were aborted. Its own are not known yet.
        all: all requests were aborted.
    """

    named: set[str] = field(default_factory=set)
    all: bool = False


_ARRIVAL: ContextVar[_Arrival | None] = ContextVar("ARRIVAL", default=None)
"""The request of HTTP that is being answered. It goes with the task of its answer."""


class RequestIds:
    """The client's ids of the requests in flight, each with SGLang's ids.

    A batch has an id for each prompt and often one for all.
    """

    def __init__(self) -> None:
        self._in_flight: dict[str, list[str]] = {}
        self._arriving: WeakSet[_Arrival] = WeakSet()
        # By SGLang's id of each request that is not sent yet: whether it is aborted.
        self._is_aborted: dict[str, bool] = {}

    def arrive(self) -> None:
        """A request of HTTP is there: aborts count from now on.

        The task that answers the request calls this.
        """
        arrival = _Arrival()
        _ARRIVAL.set(arrival)
        self._arriving.add(arrival)

    def check_unused(self, rid: str | list[str] | None) -> None:
        """Refuse an id that a request in flight has.

        Raises:
            BadRequest: naming the id.
        """
        for one in rid if isinstance(rid, list) else [rid]:
            if one in self._in_flight:
                raise refused("rid", one, "an id that no running request has")

    @contextmanager
    def replaced(self, obj: Any) -> Iterator[dict[str, str]]:
        """Give a request ids of its own while it is in flight.

        Args:
            obj: a GenerateReqInput. Its ``rid`` is replaced in place, and one without
                an id gets one. SGLang's health checks keep theirs.

        Yields:
            The client's id for each id of ours.

        Raises:
            BadRequest: the client uses an id twice.
        """
        from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

        given = obj.rid
        if str(given).startswith(HEALTH_CHECK_RID_PREFIX):
            yield {}
            return
        prompts = obj.text if obj.text is not None else obj.input_ids
        is_batch = isinstance(prompts, list) and not isinstance(prompts[0], int)
        num = len(prompts) if is_batch else 1
        if isinstance(given, str):
            clients = [f"{given}_{i}" for i in range(num)] if is_batch else [given]
        else:
            clients = given or []
        ours = [f"{uuid.uuid4().hex}-{rid}" for rid in clients]
        names = {client: [our] for client, our in zip(clients, ours, strict=True)}
        if isinstance(given, str):
            names[given] = ours
        if len(set(clients)) != len(clients):
            raise refused("rid", given, "another id for each prompt")
        self.check_unused(list(names))
        self._in_flight |= names
        # A request without an id has one of SGLang's form.
        ids = ours or [uuid.uuid4().hex for _ in range(num)]
        self._expect(ids, names)
        obj.rid = ids if is_batch else ids[0]
        try:
            yield dict(zip(ours, clients, strict=True))
        finally:
            for name in names:
                del self._in_flight[name]
            for one in ids:
                self._is_aborted.pop(one, None)

    def _expect(self, ids: list[str], names: dict[str, list[str]]) -> None:
        """Requests will be sent. They are aborted then, if they were until now."""
        arrival = _ARRIVAL.get() or _Arrival()
        self._arriving.discard(arrival)
        self._is_aborted |= dict.fromkeys(ids, arrival.all)
        for name in arrival.named & names.keys():
            self._is_aborted |= dict.fromkeys(names[name], True)

    def abort(self, rid: str) -> list[str]:
        """A client aborts a request.

        Returns:
            The ids under which the schedulers know it. An unknown id stays as it is.
            One that is not sent yet is left out: ``sent`` tells of its abort.
        """
        for arrival in self._arriving:
            arrival.named.add(rid)
        ids = self.sglang_ids(rid)
        waiting = self._is_aborted.keys() & ids
        self._is_aborted |= dict.fromkeys(waiting, True)
        return [one for one in ids if one not in waiting]

    def abort_all(self) -> None:
        """A client aborts all requests; the schedulers hear of it too."""
        for arrival in self._arriving:
            arrival.all = True
        self._is_aborted = dict.fromkeys(self._is_aborted, True)

    def sent(self, rid: str) -> bool:
        """A request is on its way to a scheduler. True if it is to be aborted."""
        return self._is_aborted.pop(rid, False)

    def sglang_ids(self, rid: str) -> list[str]:
        """The ids under which SGLang knows a request. An unknown id stays as it is."""
        return self._in_flight.get(rid, [rid])


def client_id(rid: str) -> str:
    """The client's id in an id of SGLang's: the rest behind what was put before it."""
    return _OURS.sub("", rid)
