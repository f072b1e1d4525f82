"""A browser for each test of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.browser import Browser, find_chromium


@pytest.fixture(scope="module")
def chromium() -> str:
    program = find_chromium()
    if program is None:
        pytest.skip("this machine has no Chromium: `apt-get install chromium`")
    return program


@pytest.fixture
def browser(chromium: str, tmp_path: Path) -> Iterator[Browser]:
    with Browser(chromium, tmp_path, size=(1180, 820)) as browser:
        yield browser
        assert browser.errors == []


@pytest.fixture
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    folder = request.config.getoption("--screenshots")
    return lambda name: Path(folder or tmp_path) / name
