"""The page in a headless Chromium: a canvas fills, two settings side by side, traces.

``make test-page`` runs it. ``--screenshots FOLDER`` keeps the pictures.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response
from sglang.srt.utils.auth import add_api_key_middleware

from helpers.browser import Browser
from helpers.page import PANEL, QUESTION, ask, end_of_run, open_page, save_trace
from helpers.serving_harness import Server
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.serving.page import Page, algorithms_route
from sglang_dllm.serving.routes import OwnPaths
from sglang_dllm.trace import canvases, load_trace

MASKS = "[...document.querySelectorAll('.panel .cell:not(.set)')].length"


def test_a_person_watches_a_canvas_fill(
    browser: Browser, demo_server: Server, picture: Callable[[str], Path]
) -> None:
    open_page(browser, demo_server)
    ask(browser, algorithm="LLaDA", max_tokens="64")
    browser.wait(f"document.querySelectorAll('.cell').length === 64 && {MASKS} < 64")
    seen = {browser.run(MASKS)}
    while browser.run("document.querySelector('#run').disabled"):
        left = browser.run(MASKS)
        if left < 42 <= min(seen):
            browser.screenshot(picture("page_filling.png"))
        seen.add(left)
        time.sleep(0.03)
    assert len(seen) >= 5, "masks become tokens over time"
    answer = demo_server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        custom_params={"dllm": {"algorithm": "LLaDA", "trace": True}},
    ).json()
    shown = browser.run("document.querySelector('.answer').textContent")
    assert shown == answer["choices"][0]["message"]["content"]
    trace = answer["dllm"]["trace"]
    facts = browser.run("[...document.querySelectorAll('dd')].map(x => x.textContent)")
    forwards, tokens = trace["steps"][-1]["forward"], answer["usage"]
    assert facts[:2] == [str(forwards), str(tokens["completion_tokens"])]
    assert facts[2] == f"{tokens['completion_tokens'] / forwards:.2f}"


def test_two_settings_side_by_side_and_a_trace_on_the_disk(
    browser: Browser,
    demo_server: Server,
    picture: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    open_page(browser, demo_server)
    browser.run("document.querySelector('#pace').value = 0")
    browser.run("document.querySelector('#compare').click()")
    ask(browser, max_tokens="64")
    end_of_run(browser)
    browser.resize(1180, 1040)
    time.sleep(0.6)  # The last token lands.
    browser.screenshot(picture("page_compared.png"))
    forwards = [
        int(browser.run(f"{PANEL.format(i)}.querySelector('dd').textContent"))
        for i in (0, 1)
    ]
    assert 0 < forwards[0] < forwards[1]
    assert browser.run("document.querySelectorAll('.best').length") >= 1

    saved = save_trace(browser)
    trace = load_trace(saved)
    assert trace.steps[-1].forward == forwards[0]
    final = "".join(cell.text for cell in canvases(trace)[-1][1] if cell)

    open_page(browser, demo_server)
    browser.choose_file(".file", saved)
    browser.wait("document.querySelectorAll('.cell.set').length === 64")
    shown = browser.run(
        "[...document.querySelectorAll('.cell')].map(x => x.textContent).join('')"
    )
    assert shown == final.replace("\n", "↵").replace("<|endoftext|>", "∎")
    browser.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('input[type=range]'))"
    )
    assert browser.run(MASKS) == 64 - len(trace.steps[0].committed)

    bad = tmp_path / "bad.json"
    bad.write_text('{"steps": []}')
    browser.choose_file(".file", bad)
    browser.wait("document.querySelector('.panel .problem').textContent.length > 0")


def test_active_canvases_are_listed(browser: Browser, demo_server: Server) -> None:
    open_page(browser, demo_server)
    browser.run("document.querySelector('#state').open = true")
    line = "document.querySelector('#state .line').textContent"
    browser.wait(f"{line} === '0 active, 0 in the queue'")
    ask(browser, algorithm="LLaDA", max_tokens="256")
    row = browser.wait("document.querySelector('#state tr')?.textContent")
    assert "LLaDA" in row and "of 256 tokens" in row
    browser.run("document.querySelector('#stop').click()")
    browser.wait(f"{line} === '0 active, 0 in the queue'")


def test_a_refusal_and_markup_are_shown_as_text(
    browser: Browser, demo_server: Server, tmp_path: Path
) -> None:
    open_page(browser, demo_server)
    ask(browser, max_tokens="100000")
    problem = "document.querySelector('.panel .problem').textContent"
    assert "max_tokens=100000" in browser.wait(problem)
    hostile = "<img src=x onerror=document.title='hit'>"
    step = {"forward": 1, "committed": [[0, 5, hostile, 0.5]]}
    trace = {"format": "sglang-dllm-trace", "version": 1, "answer_len": 2}
    file = tmp_path / "trace.json"
    page = {"text": hostile, "prompt": hostile}
    file.write_text(json.dumps({**trace, "steps": [step], "page": page}))
    browser.choose_file(".file", file)
    browser.wait("document.querySelectorAll('.cell.set').length === 1")
    assert browser.run("document.querySelector('.cell').textContent") == hostile
    assert browser.run("document.querySelector('.answer').textContent") == hostile
    assert browser.run("document.querySelectorAll('main img').length") == 0
    assert browser.run("document.title") != "hit"
    browser.errors.clear()  # The refusal is an error of the network, to the browser.


@pytest.fixture
def keyed() -> Iterator[str]:
    """The address of the page behind a path and a key, with SGLang's check of keys.

    No model runs: the route of chat answers with one draft and a trace.
    """
    trace = {"format": "sglang-dllm-trace", "version": 1, "answer_len": 2, "steps": []}
    start = {"answer_len": 2, "pinned": [[1, 7, "given"]], "prompt_len": 1}
    draft = {"steps": [{"forward": 1, "committed": [[0, 5, "a", None]]}]}
    draft |= {"start": start, "masked": [], "answer_len": 2}
    part = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}
    part |= {"dllm": {"draft": draft, "trace": trace | {"steps": draft["steps"]}}}
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        return Response(f"data: {json.dumps(part)}\n\ndata: [DONE]\n\n")

    family = FAMILIES["LLaDAModelLM"]
    manager = SimpleNamespace(
        served_model_name="keyed",
        max_req_input_len=90,
        tokenizer=SimpleNamespace(chat_template="x"),
    )
    checks: Any = SimpleNamespace(
        manager=manager,
        facts=SimpleNamespace(family=family),
        decode=parse_decode_config("LLaDA", family, {}),
    )
    app.router.routes.append(algorithms_route(checks))
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    whole = OwnPaths(Page(app))
    config = uvicorn.Config(whole, port=0, root_path="/behind", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/behind/dllm"
    server.should_exit = True
    thread.join()


def test_a_key_and_a_path_of_a_proxy(browser: Browser, keyed: str) -> None:
    browser.go(keyed)
    problem = "document.querySelector('#problem').textContent"
    assert "API key" in browser.wait(problem)
    browser.errors.clear()  # The answer 401 is an error of the network.
    browser.run(
        "(key => { key.value = 'secret'; key.dispatchEvent(new Event('change')); })"
        "(document.querySelector('#key'))"
    )
    browser.wait("!document.querySelector('#run').disabled")
    assert browser.run(problem) == ""
    ask(browser, max_tokens="2")
    browser.wait("document.querySelectorAll('.cell.set').length === 2")
    classes = browser.run(
        "[...document.querySelectorAll('.cell')].map(x => x.className)"
    )
    assert "rule" in classes[0] and "pinned" in classes[1]
