"""Requests that no client should send, from a seed, over all routes."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import urllib3

from sglang_dllm.serving.routes import ANSWERED, REFUSED

_MESSAGES = [{"role": "user", "content": "1+1="}]
_CHAT: dict[str, Any] = {"model": "demo", "messages": _MESSAGES, "max_tokens": 4}
_SAMPLING: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": {"model": "demo", "prompt": "1+1=", "max_tokens": 4},
    "/v1/responses": {"model": "demo", "input": "1+1=", "max_output_tokens": 4},
    "/v1/messages": _CHAT,
    "/v1/messages/count_tokens": {"model": "demo", "messages": _MESSAGES},
    "/generate": {
        "input_ids": [40, 41],
        "sampling_params": {
            **_SAMPLING,
            "custom_params": {"dllm": {"algorithm": "LLaDA", "steps": 4}},
        },
    },
    "/invocations": _CHAT,
    "/vertex_generate": {"instances": [{"text": "1"}], "parameters": _SAMPLING},
    "/v1/score": {"query": "1+1=", "items": ["2"], "model": "demo"},
    "/api/chat": {
        "model": "demo",
        "messages": _MESSAGES,
        "options": {"num_predict": 4},
    },
    "/api/generate": {"model": "demo", "prompt": "1", "options": {"num_predict": 4}},
    "/api/show": {"model": "demo"},
    "/tokenize": {"model": "demo", "prompt": "1+1="},
    "/detokenize": {"model": "demo", "tokens": [40, 41]},
    "/abort_request": {"rid": "nobody"},
    "/v1/embeddings": {"model": "demo", "input": "1"},
}
"""A sound body of each route, which the generator spoils."""

ROUTES = sorted({*SOUND, *ANSWERED, *REFUSED})

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(1e308, float("nan"), float("inf"), float("-inf"), "", "x", "\x00", "\ud800"),
    *("é" * 1000, "9" * 5000, [], {}, [[]], [None], {"": None}, [[[[[[1]]]]]], "NaN"),
    *(["a", 1, None], {"a": {"b": {"c": []}}}, "null", "../../etc/passwd", "0x10"),
]

_NAMES = (
    *(
        "dllm",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "regex",
        "json_schema",
        "canvas",
    ),
    *("max_new_tokens", "rid", "tools", "tool_choice", "response_format", "suffix"),
    *("return_logprob", "input_embeds", "image_data", "lora_path", "priority", "user"),
    *("temperature", "top_p", "custom_params", "sampling_params", "__class__", "☃"),
)

_TYPES = (
    *(
        "text/plain",
        "application/xml",
        "multipart/form-data",
        "application/json; charset=x",
    ),
    *("application/x-www-form-urlencoded", "application/octet-stream", "", "json"),
    "multipart/form-data; boundary=a",
)


@dataclass(frozen=True)
class Malformed:
    """One request."""

    method: str
    path: str
    body: bytes
    content_type: str = "application/json"


def malformed(rng: random.Random) -> Iterator[Malformed]:
    """Requests without end. Few of them happen to be sound."""
    while True:
        path = rng.choice(ROUTES)
        body = copy.deepcopy(SOUND.get(path, {"model": "demo", "input": "1"}))
        kind = rng.randrange(10)
        if kind < 5:
            for _ in range(rng.choice([1, 1, 2, 5])):
                _spoil(rng, body)
            yield Malformed("POST", path, _dumped(body))
        elif kind == 5:
            yield Malformed("POST", path, _dumped(rng.choice(_ODD)))
        elif kind == 6:
            yield Malformed("POST", path, _cut(rng, _dumped(body)))
        elif kind == 7:
            yield Malformed("POST", path, rng.randbytes(rng.choice([0, 1, 30, 5000])))
        elif kind == 8:
            depth = rng.choice([100, 2_000, 100_000])
            deep = rng.choice([b"[", b'{"a":', b'[{"messages":']) * depth
            yield Malformed("POST", path, deep)
        else:
            method = rng.choice(["POST", "POST", "PUT", "DELETE", "PATCH", "GET"])
            yield Malformed(method, path, _dumped(body), rng.choice(_TYPES))


def _spoil(rng: random.Random, body: Any) -> None:
    """Change, add or remove one thing somewhere in a body."""
    inner = [x for x in body.values() if isinstance(x, dict | list) and x]
    if inner and rng.random() < 0.5:
        body = rng.choice(inner)
        if isinstance(body, dict):
            return _spoil(rng, body)
        body[rng.randrange(len(body))] = rng.choice(_ODD)
        return None
    name = rng.choice(sorted(body)) if rng.random() < 0.6 else rng.choice(_NAMES)
    if rng.random() < 0.15:
        body.pop(name, None)
    else:
        body[name] = copy.deepcopy(rng.choice(_ODD))
    return None


def _dumped(body: Any) -> bytes:
    """JSON, with the NaN and the lone surrogates that JSON does not have."""
    text = json.dumps(body, ensure_ascii=False)
    return text.encode("utf-8", errors="surrogatepass")


def _cut(rng: random.Random, text: bytes) -> bytes:
    start = rng.randrange(len(text))
    return rng.choice(
        [text[:start], text[start:], text[:start] + b"\xff" + text[start:]]
    )


def send_malformed(
    base_url: str, num: int, seconds: float, seed: int
) -> tuple[Counter[int], list[str]]:
    """Send malformed requests, four at a time, until the number or the time is over.

    Returns:
        How many had each status, 0 where no answer came within 60 s; and the requests
        with a status of 500 or more, or none.
    """
    pool = urllib3.PoolManager(maxsize=4, retries=False, timeout=60)
    deadline = time.monotonic() + seconds

    def send(one: Malformed) -> tuple[int, str] | None:
        if time.monotonic() > deadline:
            return None
        headers = {"Content-Type": one.content_type}
        try:
            answer = pool.request(
                one.method, base_url + one.path, body=one.body, headers=headers
            )
        except urllib3.exceptions.HTTPError as error:
            return 0, f"{one.method} {one.path} {one.body[:200]!r}: {error}"
        text = f"{one.method} {one.path} {one.content_type} {one.body[:300]!r}"
        return answer.status, f"{text}: {answer.status} {answer.data[:300]!r}"

    requests = list(islice(malformed(random.Random(seed)), num))
    with ThreadPoolExecutor(4) as threads:
        answers = [one for one in threads.map(send, requests) if one is not None]
    bad = [text for status, text in answers if not 0 < status < 500]
    return Counter(status for status, _ in answers), bad
