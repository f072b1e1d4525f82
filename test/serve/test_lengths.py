"""Answers that find their length, on every route of a real server."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.serving_harness import Server
from sglang_dllm.demo.problems import heldout

QUESTION = heldout(1)[0].question
TURN = [{"role": "user", "content": QUESTION}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURN},
    "/v1/responses": {"input": QUESTION},
    "/api/chat": {"messages": TURN, "stream": False},
}


def text_of(answer: dict[str, Any]) -> str:
    """The answer's text, whatever route it came from."""
    if "choices" in answer:
        return answer["choices"][0]["message"]["content"]
    if "message" in answer:
        return answer["message"]["content"]
    return answer["output"][-1]["content"][0]["text"]


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = server.post(path, model="demo", temperature=0, **body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_an_answer_without_a_length_grows(demo_server: Server, path: str) -> None:
    body = ROUTES[path]
    options = {"temperature": 0} if path.startswith("/api") else {}
    extra = {"options": options} if options else {}
    growing = text_of(ask(demo_server, path, **body, **extra))
    chat = {"messages": TURN, "max_tokens": 900}
    grown = {"custom_params": {"dllm": {"length": "append"}}}
    assert growing == text_of(ask(demo_server, "/v1/chat/completions", **chat, **grown))


def test_the_native_route_tells_what_was_computed(demo_server: Server) -> None:
    ids = [5, 6, 7, 8]
    answers = {
        name: demo_server.generate(ids, **given)
        for name, given in {
            "open": {},
            "append": {"custom_params": {"dllm": {"length": "append"}}},
            "fixed": {"custom_params": {"dllm": {"length": "fixed"}}},
            "sized": {"max_new_tokens": 40},
        }.items()
    }
    rules = {n: a["meta_info"]["dllm"]["length"] for n, a in answers.items()}
    assert rules == {
        "open": "append", "append": "append", "fixed": "fixed", "sized": "fixed",
    }  # fmt: skip
    assert answers["open"]["output_ids"] == answers["append"]["output_ids"]
    assert answers["fixed"]["meta_info"]["canvas_len"] == 4 + 256
    assert answers["sized"]["meta_info"]["canvas_len"] == 4 + 40


@pytest.mark.parametrize(
    ("dllm", "words"),
    [
        ({"length": "short"}, "fixed, append, rho_eos or daedal"),
        ({"length": "rho_eos", "low_density": 2}, "a number, 0 to 1"),
        ({"length": "rho_eos", "step_schedule": "power"}, "exp, linear or const"),
        ({"length": "daedal", "initial_length": 0}, "an integer, 1 to 4096"),
        ({"length_step": 4}, "rho_eos"),
        ({"length": "append", "algorithm": "Dream"}, "fixed"),
    ],
    ids=str,
)
def test_a_bad_rule_is_refused(
    demo_server: Server, dllm: dict[str, Any], words: str
) -> None:
    body = {"messages": TURN, "custom_params": {"dllm": dllm}}
    response = demo_server.post("/v1/chat/completions", model="demo", **body)
    assert response.status_code == 400
    assert words in response.text
