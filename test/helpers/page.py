"""How a person uses the page of a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from helpers.browser import Browser
from helpers.serving_harness import Server

QUESTION = (
    "Tom has 62 apples. He buys 25 more. He sells 34. He finds 18 more. "
    "How many apples does Tom have?"
)
"""As the page has it at first."""
SOLUTION = "62 + 25 = 87\n87 - 34 = 53\n53 + 18 = 71\n#### 71"
PANEL = "document.querySelectorAll('.panel')[{}]"


def open_page(browser: Browser, server: Server) -> None:
    browser.go(f"{server.base_url}/dllm")
    browser.wait("!document.querySelector('#run').disabled")


def ask(browser: Browser, **settings: Any) -> None:
    """Set fields of all panels by name, and press Run."""
    for name, value in settings.items():
        browser.run(
            f"document.querySelectorAll('.panel [name={name}]').forEach(field => {{"
            f"field.value = {json.dumps(value)};"
            "field.dispatchEvent(new Event('change')); })"
        )
    browser.run("document.querySelector('#run').click()")


def end_of_run(browser: Browser) -> None:
    """Wait until all canvases are done."""
    browser.wait("!document.querySelector('#run').disabled", seconds=120)


def save_trace(browser: Browser) -> Path:
    """Press *Save trace* of the first panel."""
    browser.run(f"{PANEL.format(0)}.querySelector('.save').click()")
    saved = browser.downloads / "trace-A.json"
    deadline = time.monotonic() + 30
    while not saved.exists():
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.1)
    return saved


def type_gaps(browser: Browser, text: str) -> None:
    """Choose *fill gaps*, and type an answer with gaps."""
    browser.run(
        "(tick => tick.checked || tick.click())(document.querySelector('#fill'))"
    )
    browser.run("document.querySelector('#template').select()")
    browser.call("Input.insertText", text=text)


def drag(browser: Browser, selector: str, text: str) -> None:
    """Select a text of the first such element with the mouse."""
    box = browser.run(
        f"(node => {{ node.scrollIntoView(); const range = new Range();"
        f"const leaf = node.firstChild, at = leaf.data.indexOf({json.dumps(text)});"
        f"range.setStart(leaf, at); range.setEnd(leaf, at + {len(text)});"
        "const {left, right, top, bottom} = range.getBoundingClientRect();"
        "return {left, right, y: (top + bottom) / 2}; })"
        f"(document.querySelector({json.dumps(selector)}))"
    )
    for kind, x in (
        ("mousePressed", box["left"]),
        ("mouseMoved", box["right"]),
        ("mouseReleased", box["right"]),
    ):
        _mouse(browser, kind, x, box["y"])


def press(browser: Browser, selector: str) -> None:
    """Click the first such element with the mouse."""
    x, y = browser.run(
        "(node => { node.scrollIntoView(); const box = node.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })"
        f"(document.querySelector({json.dumps(selector)}))"
    )
    for kind in ("mousePressed", "mouseReleased"):
        _mouse(browser, kind, x, y)


def _mouse(browser: Browser, kind: str, x: float, y: float) -> None:
    browser.call(
        "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
    )
