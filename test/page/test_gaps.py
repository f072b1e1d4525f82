"""Gaps on the page: a person gives a part of the answer, or has a part written anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from helpers.browser import Browser
from helpers.page import (
    PANEL,
    SOLUTION,
    ask,
    drag,
    end_of_run,
    open_page,
    press,
    save_trace,
    type_gaps,
)
from helpers.serving_harness import Server

ANSWER = f"{PANEL}.querySelector('.answer')"
TEXT = f"{ANSWER}.textContent"
GAPS = f"[...{ANSWER}.querySelectorAll('mark')].map(x => x.textContent)"
PROBLEMS = "[...document.querySelectorAll('.panel .problem')].map(x => x.textContent)"
TEMPLATE = "document.querySelector('#template')"


def test_gaps_fill_between_given_text(
    browser: Browser, demo_server: Server, picture: Callable[[str], Path]
) -> None:
    open_page(browser, demo_server)
    type_gaps(browser, "62 +[[2]] = 87\n[[8]]\n53 + 18 = 71\n#### 71")
    browser.resize(1180, 1030)
    ask(browser, algorithm="LLaDA")
    browser.wait(f"{GAPS.format(0)}.length")
    shown = []
    while browser.run("document.querySelector('#run').disabled"):
        gaps, text = browser.run(f"[{GAPS.format(0)}, {TEXT.format(0)}]")
        if "".join(gaps).count("▁") == 4:
            browser.screenshot(picture("page_gaps.png"))
        shown.append((*gaps, text))
        time.sleep(0.03)
    assert len(set(shown)) >= 5, "masks become tokens over time"
    for first, second, text in shown:
        assert text == f"62 +{first} = 87\n{second}\n53 + 18 = 71\n#### 71"
    assert browser.run(GAPS.format(0)) == [" 25", "87 - 34 = 53"]
    assert browser.run(TEXT.format(0)) == SOLUTION
    assert browser.run(PROBLEMS) == [""]
    tokens = "document.querySelector('[data-fact=tokens]').textContent"
    assert browser.run(tokens) == "10"
    decoded = "document.querySelectorAll('.cell:not(.pinned)').length"
    assert browser.run(decoded) == 10


def test_a_character_of_several_tokens_is_whole_at_the_end(
    browser: Browser, demo_server: Server
) -> None:
    given = "Tom 🍎 é [x](y) $1 62 +", " = 87"
    open_page(browser, demo_server)
    type_gaps(browser, f"{given[0]}[[2]]{given[1]}")
    ask(browser)
    end_of_run(browser)
    (gap,) = browser.run(GAPS.format(0))
    assert browser.run(TEXT.format(0)) == f"{given[0]}{gap}{given[1]}"
    saved = save_trace(browser)
    open_page(browser, demo_server)
    browser.choose_file(".file", saved)
    browser.wait("!document.querySelector('.save').disabled")
    assert browser.run(TEXT.format(0)) == f"{given[0]}{gap}{given[1]}"
    assert browser.run(GAPS.format(0)) == [gap]
    assert browser.run(PROBLEMS) == [""]


def test_a_refusal_is_shown_at_the_field(browser: Browser, demo_server: Server) -> None:
    open_page(browser, demo_server)
    browser.run("document.querySelector('#compare').click()")
    type_gaps(browser, "62 +[[2]] = 87\n[[0]]\n")
    problem = "document.querySelector('#template-problem').textContent"
    ask(browser)
    message = browser.wait(problem)
    assert "canvas[3].mask=0" in message and "1 to 1017" in message
    end_of_run(browser)
    assert browser.run(f"document.activeElement === {TEMPLATE}")
    assert browser.run(f"{TEMPLATE}.getAttribute('aria-invalid')") == "true"
    assert browser.run("getSelection().toString()") == "[[0]]"
    assert browser.run(PROBLEMS) == ["", ""]
    browser.call("Input.insertText", text="[[8]]")
    assert browser.run(problem) == ""
    assert browser.run(f"{TEMPLATE}.getAttribute('aria-invalid')") == "false"
    type_gaps(browser, "no gap [[x]]")
    ask(browser)
    assert "at least 1 mask" in browser.wait(problem)
    end_of_run(browser)
    browser.errors.clear()  # The refusals are errors of the network, to the browser.


def test_selected_text_of_an_answer_is_written_anew(
    browser: Browser, demo_server: Server
) -> None:
    open_page(browser, demo_server)
    browser.run("document.querySelector('#pace').value = 0")
    ask(browser)
    end_of_run(browser)
    assert browser.run(TEXT.format(0)) == SOLUTION
    drag(browser, ".answer", "34 = 5")
    press(browser, ".again")
    browser.wait(f"{GAPS.format(0)}.length")
    end_of_run(browser)
    marked = SOLUTION.replace("34 = 5", "[[~34 = 5~]]")
    assert browser.run(f"{TEMPLATE}.value") == marked
    # The first character of the selection has its space in its token.
    assert browser.run(GAPS.format(0)) == [" 34 = 5"]
    assert browser.run(TEXT.format(0)) == SOLUTION


def test_a_draft_is_corrected_under_two_settings(
    browser: Browser, demo_server: Server
) -> None:
    open_page(browser, demo_server)
    browser.run("document.querySelector('#pace').value = 0")
    browser.run("document.querySelector('#compare').click()")
    ask(browser)
    end_of_run(browser)
    browser.run("getSelection().removeAllRanges()")
    press(browser, ".again")
    assert browser.run(f"{TEMPLATE}.value") == SOLUTION
    assert browser.run(f"document.activeElement === {TEMPLATE}")
    # An emoji is one character to the server, and two to the browser.
    draft = "🍎 " + SOLUTION.replace("= 53", "= 99")
    type_gaps(browser, draft)
    start = browser.run(f"{TEMPLATE}.value.indexOf('99')")
    browser.run(f"{TEMPLATE}.setSelectionRange({start}, {start} + 2)")
    press(browser, "#mask-selection")
    assert browser.run(f"{TEMPLATE}.value") == draft.replace("99", "[[~99~]]")
    ask(browser)
    end_of_run(browser)
    for panel in (0, 1):
        assert browser.run(TEXT.format(panel)) == f"🍎 {SOLUTION}"
        assert browser.run(GAPS.format(panel)) == [" 53"]
