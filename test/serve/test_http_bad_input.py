"""Bad input is status 400 with the field's name, on every route, streamed or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests
import sglang

from helpers.bad_bodies import LATER, MALFORMED, ROUTES, SMALLEST, bad_bodies
from helpers.odd_items import check_refusals, odd_bodies
from helpers.serving_harness import Server
from sglang_dllm.demo import demo_path
from sglang_dllm.serving.routes import REFUSED

MESSAGES = SMALLEST["chat"]["messages"]
ANTHROPIC = {"model": "a", "messages": MESSAGES, "max_tokens": 4}
_FOLDERS = [str(demo_path()), str(Path(sglang.__file__).parents[1])]
PLACES = re.compile("|".join(["Traceback", "File ", *map(re.escape, _FOLDERS)]))
"""The folder of the checkpoint, that of the installed packages, and tracebacks."""

REDACTED = {"type": "redacted_thinking", "data": "x"}


def refusal(response: requests.Response) -> str:
    assert response.status_code == 400, response.text[:500]
    assert not PLACES.search(response.text), response.text[:500]
    assert "event-stream" not in response.headers["content-type"]
    answer = response.json()
    error = answer.get("error") or answer
    # Ollama's errors are strings.
    message: str = error if isinstance(error, str) else error["message"]
    return message


def sample() -> list[Any]:
    """Every 17th body that the check refuses, and all that need the server."""
    table = [*bad_bodies()[::17]]
    table += [(route, text, SMALLEST[route] | change) for route, text, change in LATER]
    return [
        pytest.param(route, text, body, i % 2 == 1, id=f"{route}-{text}-{i}")
        for i, (route, text, body) in enumerate(table)
    ]


@pytest.mark.parametrize(("route", "text", "body", "stream"), sample())
def test_a_wrong_field_is_named(
    demo_server: Server, route: str, text: str, body: dict[str, Any], stream: bool
) -> None:
    """All bodies are in test/serving/test_body_properties.py, without a server."""
    answer = demo_server.post(ROUTES[route], **body, stream=stream)
    assert text in refusal(answer)


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_is_refused_before_it_begins(demo_server: Server, route: str) -> None:
    """Options and lengths too, which are known after the prompt is tokenized."""
    for dllm in ({"algorithm": "Nope"}, {"cache": "sometimes"}, 5):
        params: dict[str, Any] = {"custom_params": {"dllm": dllm}}
        if route == "generate":
            params = {"sampling_params": params}
        answer = demo_server.post(
            ROUTES[route], **SMALLEST[route] | params, stream=True
        )
        assert "custom_params.dllm" in refusal(answer)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_stream_options_need_a_stream(demo_server: Server, route: str) -> None:
    options = {"include_usage": True}
    answer = demo_server.post(ROUTES[route], **SMALLEST[route], stream_options=options)
    assert "stream_options" in refusal(answer)


@pytest.mark.parametrize(("route", "field", "raw"), MALFORMED)
def test_malformed_json_is_refused(
    demo_server: Server, route: str, field: str, raw: str
) -> None:
    answer = requests.post(
        demo_server.base_url + ROUTES[route],
        data=raw.encode(),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert field in refusal(answer)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(
    demo_server: Server, route: str, stream: bool
) -> None:
    body = json.loads(json.dumps(SMALLEST[route]).replace("1+1=", "1+1=" * 5000))
    message = refusal(demo_server.post(ROUTES[route], **body, stream=stream))
    assert "tokens; expected 1 to" in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/detokenize", {"tokens": [-1]}),
        ("/v1/messages", {**ANTHROPIC, "max_tokens": 0}),
        ("/v1/messages", {**ANTHROPIC, "thinking": {"type": "adaptive"}}),
        (
            "/v1/messages",
            {**ANTHROPIC, "messages": [{"role": "assistant", "content": [REDACTED]}]},
        ),
        ("/v1/embeddings", {"model": "a", "input": "a"}),
        ("/encode", {"text": "a"}),
        ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"a": 1}}),
        ("/vertex_generate", {"instances": [{"text": "a"}, {"input_ids": [1]}]}),
        ("/api/generate", {"model": "a", "prompt": "a", "options": {"top_p": 5}}),
    ],
)
def test_other_routes_refuse_too(
    demo_server: Server, path: str, body: dict[str, Any]
) -> None:
    refusal(demo_server.post(path, **body, stream=False))


@pytest.mark.parametrize(("path", "instead"), [(p, r[0]) for p, r in REFUSED.items()])
def test_a_route_of_other_models_names_the_one_to_use(
    demo_server: Server, path: str, instead: str
) -> None:
    if path != "/v1/realtime":
        message = refusal(demo_server.post(path))
        assert path in message and message.endswith(f"expected {instead}")


def test_an_odd_item_of_a_conversation_is_refused(demo_server: Server) -> None:
    check_refusals(demo_server, [*odd_bodies()][::6])


def test_nothing_leaks_after_all_that(demo_server: Server) -> None:
    assert demo_server.generate([1, 2, 3], max_new_tokens=4)["output_ids"] is not None
    load = demo_server.wait_until_idle()
    assert load["num_used_tokens"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": 5}),
        ("/v1/detokenize", {"tokens": {}}),
        ("/abort_request", {"rid": [5]}),
        ("/parse_function_call", []),
        ("/separate_reasoning", {}),
        ("/pause_generation", {"mode": 5}),
        ("/v1/responses", {"input": 5}),
        ("/v1/messages", {"model": "a", "max_tokens": 4, "messages": [{"role": 5}]}),
        ("/api/show", {"model": 5}),
    ],
)
def test_a_body_that_fastapi_refuses_names_no_file(
    demo_server: Server, path: str, body: Any
) -> None:
    answer = requests.post(demo_server.base_url + path, json=body, timeout=60)
    refusal(answer)


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/dllm/state", "/", "/x"])
def test_what_clients_may_read_names_no_file(demo_server: Server, path: str) -> None:
    answer = requests.get(demo_server.base_url + path, timeout=60)
    assert not PLACES.search(answer.text), answer.text[:500]


@pytest.mark.parametrize("path", ["/generate", "/v1/score", "/api/chat", "/tokenize"])
def test_a_body_has_bounds(demo_server: Server, path: str) -> None:
    address = demo_server.base_url + path
    deep = b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}"
    json_type = {"Content-Type": "application/json"}
    answer = requests.post(address, data=deep, headers=json_type, timeout=60)
    assert "nests too deeply" in refusal(answer)
    answer = requests.post(address, json={"a": [[]] * 20_000}, timeout=60)
    assert "too many parts" in refusal(answer)
    large = (b"x" * 2**20 for _ in range(5))
    answer = requests.post(address, data=large, headers=json_type, timeout=60)
    assert answer.status_code == 413
    assert "at most 4194304 bytes" in answer.json()["message"]
