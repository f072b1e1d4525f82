"""A storm of random requests on one server: streams, aborts, hang-ups, pauses."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import requests

from helpers.random_settings import Case
from helpers.serving_harness import Server, events_of

NUM_CLIENTS = 12
WHOLE = ("whole", "stream")
CUTS = ("abort", "abort stream", "hang up")
ENDS = (*WHOLE * 4, *CUTS, "refused")
"""How a request may end. Its client aborts it by its id, closes the connection, or
asks for an option that is out of range; or the request runs to its end."""
ENDED = (*WHOLE, "aborted", "too late", "hang up", "refused", "503", "500")
"""How a request that is not lost has ended."""


@dataclass
class Storm:
    """Clients that ask one server at random until a time is over.

    Args:
        server: asked by many clients at once.
        cases: the requests to choose from; each is first asked alone.
        seed: of all random choices.
    """

    server: Server
    cases: list[Case]
    seed: int
    alone: list[list[int]] = field(default_factory=list)
    """The tokens of each case, from a server that does nothing else."""
    counts: Counter[str] = field(default_factory=Counter)
    """``sent`` requests, and how they ``ENDED``, or that they were ``lost``. One
    that is ``too late`` ended before its abort. Some are ``compared`` and ``equal``."""
    different: list[tuple[Case, list[int], list[int]]] = field(default_factory=list)
    """Cases with the tokens they got alone and in the storm."""
    num_retractions: int = 0
    _ids: count[int] = field(default_factory=count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask_alone(self) -> None:
        for case in self.cases:
            answer = self.server.generate(list(case.prompt), **case.sampling_params())
            self.alone.append(answer["output_ids"])

    def run(
        self,
        seconds: float,
        ends: Sequence[str] = ENDS,
        num_clients: int = NUM_CLIENTS,
        with_pauses: bool = False,
        num_cuts: float = float("inf"),
        goes_on: Callable[[], bool] = lambda: True,
    ) -> Counter[str]:
        """Raises what any of the clients raises, and waits until all have ended.

        Args:
            ends: to choose from.
            with_pauses: whether an operator pauses the scheduler at times.
            num_cuts: the storm ends early after so many aborts and hang-ups.
            goes_on: asked before each request; the client leaves if not.

        Returns:
            The counts of this run.
        """
        before = self.counts.copy()
        deadline = time.monotonic() + seconds
        last_cut = num_cuts + self._num_cuts()

        def is_open() -> bool:
            is_late = time.monotonic() >= deadline or self._num_cuts() >= last_cut
            return not is_late and goes_on()

        with ThreadPoolExecutor(num_clients + 1) as pool:
            clients = [
                pool.submit(
                    self._client,
                    random.Random(f"{self.seed}-{i}-{before['sent']}"),
                    *(ends, is_open),
                )
                for i in range(num_clients)
            ]
            if with_pauses:
                operator = random.Random(f"{self.seed}-operator")
                clients.append(pool.submit(self._pause_at_times, operator, deadline))
            for client in clients:
                client.result()
        return self.counts - before

    def _num_cuts(self) -> int:
        return sum(self.counts[kind] for kind in ("aborted", "too late", "hang up"))

    def _client(
        self,
        rng: random.Random,
        ends: Sequence[str],
        is_open: Callable[[], bool],
    ) -> None:
        while is_open():
            is_busy = self.ask(rng.randrange(len(self.cases)), rng.choice(ends), rng)
            time.sleep(rng.random() + 0.5 if is_busy else rng.random() ** 4)

    def _pause_at_times(self, rng: random.Random, deadline: float) -> None:
        """Pauses of the scheduler, with the running requests kept or retracted."""
        while time.monotonic() < deadline:
            time.sleep(min(3 + 5 * rng.random(), max(deadline - time.monotonic(), 0)))
            mode = rng.choice(["in_place", "retract"])
            self.num_retractions += mode == "retract"
            assert self.server.post("/pause_generation", mode=mode).ok
            time.sleep(0.3 * rng.random())
            assert self.server.post("/continue_generation").ok

    def ask(self, index: int, end: str, rng: random.Random) -> bool:
        """Ask one case, and note how it ended; True if the server was too busy."""
        self._note("sent")
        try:
            how = self._ask(index, end, 0.3 * rng.random() ** 3)
        except requests.RequestException:
            how = "lost"
        self._note(how)
        return how == "503"

    def _ask(self, index: int, end: str, delay: float) -> str:
        case, before = self.cases[index], self.num_retractions
        body = self._body(case, is_stream=end in ("stream", "abort stream", "hang up"))
        if end == "refused":
            body["sampling_params"]["custom_params"]["dllm"]["max_forwards"] = -1
            assert self.server.post("/generate", **body).status_code == 400
            return end
        if end == "hang up":
            self._hang_up(body, delay)
            return end
        timer = threading.Timer(
            delay, self.server.post, ["/abort_request"], {"rid": body["rid"]}
        )
        if end.startswith("abort"):
            timer.start()
        response = self.server.post("/generate", **body)
        timer.cancel()
        if end.startswith("abort") and "was aborted" in response.text:
            # SGLang's answer where the abort comes before the scheduler has it.
            return "aborted"
        if response.status_code in (500, 503):
            if response.status_code == 503 and "retry-after" not in response.headers:
                self._note("503 without Retry-After")
            return str(response.status_code)
        answer = last_answer(response)
        finish = answer["meta_info"]["finish_reason"]
        if finish.get("status_code") in (500, 503):
            return str(int(finish["status_code"]))
        reason = finish["type"]
        assert reason in ("stop", "length") or end.startswith("abort"), answer
        is_watched = "trace" in body["sampling_params"]["custom_params"]["dllm"]
        if is_watched and reason != "abort":
            self._note("watched")
            steps = answer["meta_info"]["dllm"]["trace"]["steps"]
            forwards = [step["forward"] for step in steps if "resized" not in step]
            assert forwards == list(range(1, len(forwards) + 1))
        # A retracted canvas starts its cache anew, and may choose other tokens.
        if "cache" not in case.options or before == self.num_retractions:
            self._compare(index, answer["output_ids"], is_whole=reason != "abort")
        if reason == "abort":
            return "aborted"
        return "too late" if end.startswith("abort") else end

    def _body(self, case: Case, is_stream: bool) -> dict[str, Any]:
        number, params = next(self._ids), case.sampling_params()
        if number % 4 == 0:
            watch = {"trace": True, **({"stream": "draft"} if is_stream else {})}
            params["custom_params"] = {"dllm": params["custom_params"]["dllm"] | watch}
        return {
            "rid": f"storm-{self.seed}-{number}.",
            "input_ids": list(case.prompt),
            "sampling_params": params,
            "stream": is_stream,
        }

    def _hang_up(self, body: dict[str, Any], delay: float) -> None:
        with contextlib.suppress(requests.RequestException):
            url, timeout = self.server.base_url + "/generate", (30, delay + 0.01)
            with requests.post(url, json=body, stream=True, timeout=timeout) as answer:
                next(answer.iter_lines())

    def _compare(self, index: int, ids: list[int], is_whole: bool) -> None:
        wanted = self.alone[index] if is_whole else self.alone[index][: len(ids)]
        with self._lock:
            self.counts["compared"] += 1
            if ids == wanted:
                self.counts["equal"] += 1
            else:
                self.different.append((self.cases[index], self.alone[index], ids))

    def _note(self, end: str) -> None:
        with self._lock:
            self.counts[end] += 1


def last_answer(response: requests.Response) -> dict[str, Any]:
    """The answer of a stream or of a plain response; a stream changes no token."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        assert response.status_code == 200, response.text
        return dict(response.json())
    events = events_of(response)
    last = events[-1]
    is_abort = last["meta_info"]["finish_reason"]["type"] == "abort"
    before = events[-2]["output_ids"] if len(events) > 1 else []
    if is_abort and len(last["output_ids"]) == 1 < len(before):
        # SGLang's own answer to the abort of a request that it retracted, and that
        # waits again, repeats the last token only.
        assert before[-1:] == last["output_ids"]
        events[-1] = {**last, "output_ids": before}
    for one, later in pairwise(events):
        ids = one["output_ids"]
        assert later["output_ids"][: len(ids)] == ids, "a streamed token changed"
    return dict(events[-1])
