"""A running server exports all that the board and the alert rules ask for."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from helpers.serving_harness import Server
from tools.monitoring import board
from tools.monitoring.draw_board import load
from tools.monitoring.series import Scrape

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in board.board()["panels"] for target in panel["targets"]
]
SLOW = {"algorithm": "EntropyThreshold", "threshold": 0}
"""One token a forward."""
OF_SCRAPING = ("up", "instance")
"""The names that Prometheus adds itself."""


Condition = tuple[str, str, str]
"""Label, operator and value of a selector."""


def metrics_of(expression: str) -> list[tuple[str, list[Condition]]]:
    """Metrics of a PromQL expression, each with the conditions of its selector."""
    found = re.findall(r"(sglang:\w+)(?:\{([^}]*)\})?", expression)
    condition = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
    return [(name, condition.findall(labels)) for name, labels in found]


def asks_for(condition: Condition, labels: Mapping[str, str]) -> bool:
    """True if a series may be one that is asked for.

    A server may have none that a negative condition leaves over, and a person chooses
    the value of a variable of the board.
    """
    label, operator, value = condition
    if label not in labels:
        return False
    if operator.startswith("!") or value.startswith("$"):
        return True
    pattern = value if operator == "=~" else re.escape(value)
    return re.fullmatch(pattern, labels[label]) is not None


def grouped_by(expression: str) -> set[str]:
    return {
        label.strip()
        for labels in re.findall(r"by \(([^)]*)\)", expression)
        for label in labels.split(",")
    }


def scrape(server: Server) -> Scrape:
    text = requests.get(f"{server.base_url}/metrics", timeout=30).text
    return Scrape.of(0, text.splitlines())


def ask(server: Server, rid: str | None = None, **params: Any) -> requests.Response:
    body = {"text": "Tom has 5 apples.", "rid": rid, "sampling_params": params}
    return requests.post(f"{server.base_url}/generate", json=body, timeout=300)


def flood(server: Server) -> None:
    """Fill the queue, so that a request is refused; then empty it.

    A request of many prompts is taken whole.
    """
    prompts, params = [[1, 2, 3]] * 1100, {"max_new_tokens": 8}
    crowd = {"rid": "crowd", "input_ids": prompts, "sampling_params": params}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.post, "/generate", **crowd)
        deadline = time.monotonic() + 60
        while ask(server, max_new_tokens=1).status_code != 503:
            assert time.monotonic() < deadline and not asking.done()
        assert server.post("/abort_request", rid="crowd").ok
        assert asking.result().ok


@pytest.fixture(scope="module")
def series(demo_server: Server) -> list[tuple[str, Mapping[str, str]]]:
    """Name and labels of each series, behind good requests and refused ones."""
    assert ask(demo_server, max_new_tokens=16).ok
    assert ask(demo_server, temperature=-1).status_code == 400
    flood(demo_server)
    demo_server.wait_until_idle()
    return [(name, labels) for name, labels, _ in scrape(demo_server).samples]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_server_has_every_metric_and_label(
    series: list[tuple[str, Mapping[str, str]]], expression: str
) -> None:
    """One series has all labels, with the values that the expression asks for."""
    metrics = metrics_of(expression)
    assert metrics or expression.startswith("up{")
    grouped = grouped_by(expression) - set(OF_SCRAPING)
    for name, conditions in metrics:
        found = [labels for other, labels in series if other == name]
        assert found, f"/metrics has no {name}"
        assert any(
            grouped <= labels.keys()
            and all(asks_for(one, labels) for one in conditions)
            for labels in found
        ), (name, conditions, grouped)


def test_counts_of_a_request_and_of_a_refusal(demo_server: Server) -> None:
    demo_server.wait_until_idle()
    before = scrape(demo_server)
    params = {"custom_params": {"dllm": {**SLOW, "cache": "none"}}}
    meta = ask(demo_server, max_new_tokens=24, ignore_eos=True, **params).json()
    assert ask(demo_server, max_new_tokens=-7).status_code == 400
    demo_server.wait_until_idle()
    after = scrape(demo_server)

    def grown(name: str, *labels: str) -> float:
        by = labels[::2]
        return after.sums(name, by)[labels[1::2]] - before.sums(name, by)[labels[1::2]]

    kind = ("algorithm", "EntropyThreshold", "cache", "none")
    meta = meta["meta_info"]
    assert grown("sglang:dllm_forwards_total", *kind) == meta["num_forwards"]
    length = "sglang:dllm_canvas_length_tokens"
    assert grown(f"{length}_sum", *kind) == meta["canvas_len"]
    assert grown(f"{length}_count", *kind) == 1
    for phase in ("forward", "decision", "host"):
        steps = grown("sglang:dllm_phase_seconds_count", "phase", phase)
        assert 0 < steps <= meta["num_forwards"], phase
        assert grown("sglang:dllm_phase_seconds_sum", "phase", phase) > 0
    refused = ("stage", "body", "field", "max_new_tokens")
    assert grown("sglang:dllm_refusals_total", *refused) == 1
    assert after.sums("sglang:dllm_active_canvases", ()) == {(): 0}


def test_the_state_tells_how_far_a_canvas_is(demo_server: Server) -> None:
    demo_server.wait_until_idle()
    params = {"max_new_tokens": 300, "ignore_eos": True}
    params |= {"custom_params": {"dllm": SLOW}}
    asking = threading.Thread(target=ask, args=(demo_server, "seen"), kwargs=params)
    asking.start()
    seen = []
    deadline = time.monotonic() + 60
    while len(seen) < 3 or asking.is_alive():
        state = requests.get(f"{demo_server.base_url}/dllm/state", timeout=30).json()
        seen += state["canvases"]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asking.join()
    assert {c["request_id"] for c in seen} == {"seen"}
    assert {(c["algorithm"], c["to_decode"]) for c in seen} == {
        ("EntropyThreshold", 300)
    }
    forwards = [c["num_forwards"] for c in seen]
    assert forwards == sorted(forwards) and forwards[0] < forwards[-1]
    assert [c["committed"] for c in seen] == forwards, "one token a forward"
    demo_server.wait_until_idle()
    state = requests.get(f"{demo_server.base_url}/dllm/state", timeout=30).json()
    assert state == {"queued": 0, "canvases": []}
    log = demo_server.log.read_text(errors="replace")
    assert re.search(r"Canvases: \d+, queue: 0, .* tokens per forward: [\d.]+", log)


def test_the_board_is_the_one_of_its_panels() -> None:
    hint = "run python -m tools.monitoring.board"
    assert board.FILE.read_text("utf-8") == board.text(), hint


def test_the_rules_are_well_formed() -> None:
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule["for"])
        for pair in ("()", "{}", "[]"):
            assert rule["expr"].count(pair[0]) == rule["expr"].count(pair[1])
    promtool = shutil.which("promtool")
    if promtool is not None:
        command = [promtool, "check", "config", str(MONITORING / "prometheus.yml")]
        subprocess.run(command, check=True, capture_output=True)


def test_the_page_of_metrics_names_each_of_ours_and_each_rule() -> None:
    page = (ROOT / "docs/monitoring.md").read_text("utf-8")
    wanted = {name for x in EXPRESSIONS for name, _ in metrics_of(x)}
    wanted = {re.sub(r"_(bucket|sum)$", "", name) for name in wanted}
    wanted |= {rule["alert"] for rule in RULES}
    assert [name for name in sorted(wanted) if f"`{name}`" not in page] == []


def test_each_panel_has_curves_in_the_recorded_scrapes() -> None:
    """The picture in docs/ is drawn from them."""
    scrapes = load(ROOT / "benchmark/results/scrapes.json.gz")
    for panel in board.PANELS:
        for series in panel.series:
            curves = series.curves(scrapes, 5)
            assert curves and all(map(len, curves.values())), panel.title
