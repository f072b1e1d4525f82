"""The ids of requests: a client's, and the one under which SGLang knows a request.

SGLang aborts every request whose id begins with the named one, and a stream's id two
seconds after its end, whoever has it by then. So each request gets an id of its own
here. No such id begins another one, and none is used twice.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_dllm.serving.bad_request import refused

_OURS = re.compile(r"^[0-9a-f]{32}-")


class RequestIds:
    """The client's ids of the requests in flight, each with SGLang's ids.

    A batch has an id for each prompt and often one for all.
    """

    def __init__(self) -> None:
        self._in_flight: dict[str, list[str]] = {}

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
            obj: a GenerateReqInput. Its ``rid`` is replaced in place. A request without
                one gets its id from SGLang, and SGLang's health checks keep theirs.

        Yields:
            The client's id for each id of ours.

        Raises:
            BadRequest: the client uses an id twice.
        """
        from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

        given = obj.rid
        if given is None or str(given).startswith(HEALTH_CHECK_RID_PREFIX):
            yield {}
            return
        prompts = obj.text if obj.text is not None else obj.input_ids
        if isinstance(given, str) and _is_batch(prompts):
            clients = [f"{given}_{i}" for i in range(len(prompts))]
        else:
            clients = given if isinstance(given, list) else [given]
        ours = [f"{uuid.uuid4().hex}-{rid}" for rid in clients]
        names = {client: [our] for client, our in zip(clients, ours, strict=True)}
        if isinstance(given, str):
            names[given] = ours
        if len(set(clients)) != len(clients):
            raise refused("rid", given, "another id for each prompt")
        self.check_unused(list(names))
        self._in_flight |= names
        obj.rid = ours if _is_batch(prompts) else ours[0]
        try:
            yield dict(zip(ours, clients, strict=True))
        finally:
            for name in names:
                del self._in_flight[name]

    def sglang_ids(self, rid: str) -> list[str]:
        """The ids under which SGLang knows a request. An unknown id stays as it is."""
        return self._in_flight.get(rid, [rid])


def client_id(rid: str) -> str:
    """The client's id in an id of SGLang's: the rest behind what was put before it."""
    return _OURS.sub("", rid)


def _is_batch(prompts: Any) -> bool:
    return isinstance(prompts, list) and not isinstance(prompts[0], int)
