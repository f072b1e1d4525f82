"""The GSM8K benchmark without a server: its reading, its counts, its store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmark.command import BenchmarkError
from benchmark.gsm8k import cli
from benchmark.gsm8k.figures import (
    Answer,
    aup,
    busy_seconds,
    count_tokens,
    percentile,
    summarise,
    wilson,
)
from benchmark.gsm8k.problems import (
    PROMPT_FORMS,
    Problem,
    build_prompt,
    cut_at_stops,
    flexible_number,
    last_number,
    read_problems,
)
from benchmark.gsm8k.report import Run, points, sweep_aup, sweep_text
from benchmark.gsm8k.store import Store
from benchmark.speed.compare_plain_loop import Pass, compare

EOS = 0


class Words:
    """A tokenizer of space-separated words; word N is token N, `<eos>` the EOS."""

    def encode(self, text: str) -> list[int]:
        return [
            EOS if w == "<eos>" else int(w) if w.isdigit() else 99 for w in text.split()
        ]

    def decode(self, ids: Any) -> str:
        return " ".join("<eos>" if i == EOS else str(i) for i in ids)


def answer(index: int = 0, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        **{"index": index, "text": "", "right": True, "tokens": 10, "forwards": 5},
        **{"canvas_len": 40, "began": float(index), "seconds": 1.0},
        "counts": {"visible": 10, "canvas": 32},
    }
    return Answer(**{**values, **changes})


@pytest.mark.parametrize(
    ("text", "last", "flexible"),
    [
        ("5 + 3 = 8\n#### 8", "8", "8"),
        ("#### 1,234\nQ: next 7", "1234", "7"),
        ("so he has $18.00.", "18", "18"),
        ("about 2.50 each", "2.50", "2.50"),
        ("#### -3", "-3", "-3"),
        ("none", None, None),
        ("wait...", None, None),
    ],
)
def test_numbers_of_answers(text: str, last: str | None, flexible: str | None) -> None:
    assert last_number(text) == last
    assert flexible_number(text) == flexible


def test_text_ends_before_its_first_stop() -> None:
    assert cut_at_stops("8\n\nQ: 9 </s>", ["</s>", "Q:"]) == "8\n\n"
    assert cut_at_stops("8", ["Q:"]) == "8"


def test_prompt_forms_with_a_worked_example() -> None:
    shots = [Problem("1+1?", "2\n#### 2")]
    chat = build_prompt(PROMPT_FORMS["chat"], shots, "2+2?")
    assert [turn["role"] for turn in chat] == ["user", "assistant", "user"]  # type: ignore[index]
    assert chat[-1] == {"role": "user", "content": "2+2?"}
    plain = build_prompt(PROMPT_FORMS["plain"], shots, "2+2?")
    assert plain == (
        "Q: 1+1?\nA: Let's think step by step. 2\n#### 2\n\n"
        "Q: 2+2?\nA: Let's think step by step."
    )
    assert build_prompt(PROMPT_FORMS["plain-chat"], shots, "2+2?") == [
        {"role": "user", "content": plain}
    ]
    qa = build_prompt(PROMPT_FORMS["qa"], [], "2+2?")
    assert qa == "Question: 2+2?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problems"),
        ('{"question": "a", "answer": "1"}\nnot json', "line 2"),
        ('{"question": "a"}', "line 1"),
        ('{"question": "a", "answer": "no number"}', "line 1"),
        ('{"question": 3, "answer": "1"}', "line 1"),
        ("[1]", "line 1"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_problems(file)


def test_wilson_interval() -> None:
    # 8 of 10, by the formula with z = 1.959964, as in any table of it.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-4)
    low, high = wilson(20, 20)
    assert high == 1 and low == pytest.approx(1 - 0.1611, abs=1e-4)


def test_percentiles() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1, 2, 3, 4, 5], 0.9) == pytest.approx(4.6)
    assert percentile([7], 0.99) == 7


def test_busy_time_counts_overlaps_once_and_pauses_not() -> None:
    assert busy_seconds([(10, 12), (0, 2), (1, 3), (1.5, 1.6)]) == 5


def test_aup() -> None:
    assert aup([(1, 80)]) == 80
    # The best accuracy has weight 1, so equal ones give a rectangle.
    assert aup([(4, 80), (1, 80)]) == pytest.approx(80 + 3 * 80)
    low = 78 * math.exp(-3 * (1 - 78 / 80))
    expected = 80 + 0.5 * 3 * (80 + low)
    assert aup([(1, 80), (4, 78)]) == pytest.approx(expected)
    # More than 5 points below the first is dropped, exactly 5 is not.
    assert aup([(1, 80), (4, 78), (9, 74.9)]) == pytest.approx(expected)
    assert aup([(1, 80), (4, 78), (9, 75)]) > expected + 100
    # Another method's better accuracy makes all points worth less.
    assert aup([(1, 80), (4, 80)], best=90) == pytest.approx(
        80 + 3 * 80 * math.exp(-3 * (1 - 80 / 90))
    )
    # The published kind of curve: a nominal point at 1 and a measured one.
    assert aup([(1, 72.55), (2.77, 74.68)]) == pytest.approx(197.6, abs=0.1)


def test_each_count_of_tokens() -> None:
    words = Words()
    facts: dict[str, Any] = {
        **{"visible": 4, "canvas": 32, "stops": ["7"], "eos_id": EOS},
        **{"encode": words.encode, "decode": words.decode},
    }
    # Four visible tokens, an EOS, junk, a stop string in the junk.
    ids = [1, 2, 3, 4, EOS, 5, 7, 6, EOS]
    counts = count_tokens(ids=ids, text="1 2 3 4", **facts)
    assert counts == {
        "visible": 4,
        "canvas": 32,
        "not_eos": 7,
        "until_retokenised": 5,
        "eos_until_retokenised": 4,
    }
    # A stop string before the EOS shortens both, but not what was decoded.
    counts = count_tokens(ids=[1, 7, 3, 4], text="1 7 3 4", **facts)
    assert (counts["until_retokenised"], counts["eos_until_retokenised"]) == (1, 1)
    assert counts["not_eos"] == 4
    # Another server tells its text alone.
    counts = count_tokens(ids=None, text="1 2 7 3", **facts)
    assert counts["until_retokenised"] == 2 and "not_eos" not in counts
    facts |= {"encode": None, "decode": None, "eos_id": None}
    counts = count_tokens(ids=ids, text="1 2", **facts)
    assert counts == {"visible": 4, "canvas": 32}


def test_summary_of_two_requests_at_once() -> None:
    both = [answer(0), answer(1, began=0.5, forwards=15, right=False)]
    summary = summarise(both)
    assert (summary.accuracy, summary.tokens, summary.forwards) == (0.5, 20, 20)
    assert summary.tokens_per_forward == 1
    assert summary.canvas_tokens == 64
    assert summary.tokens_per_second == pytest.approx(20 / 1.5)
    # ours over the wall clock, APD over the requests' own times, dlmserve's canvas.
    assert summary.rates["ours"].tokens_per_second == pytest.approx(20 / 1.5)
    assert summary.rates["APD"].tokens_per_second == pytest.approx(20 / 2)
    assert summary.rates["dlmserve"].tokens_per_second == pytest.approx(64 / 2)
    assert summary.rates["dlmserve"].tokens_per_forward == pytest.approx(64 / 20)
    assert summary.rates["dInfer"].tokens is None


def test_warmup_counts_for_accuracy_only() -> None:
    cold = answer(0, right=False, seconds=100.0, tokens=1000, warmup=True)
    summary = summarise([cold, answer(200)])
    assert summary.accuracy == 0.5
    assert (summary.timed, summary.tokens, summary.seconds) == (1, 10, 1)
    assert summary.latency_p99 == 1


def test_forwards_unknown_of_one_are_unknown_of_all() -> None:
    summary = summarise([answer(0), answer(1, forwards=None)])
    assert summary.forwards is None and summary.tokens_per_forward is None


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("threshold=0.2,0.4", "threshold", [0.2, 0.4]),
        (" steps = 8 , 16", "steps", [8, 16]),
        ("early_stop=true,false", "early_stop", [True, False]),
        ("algorithm=LLaDA,FastDLLM", "algorithm", ["LLaDA", "FastDLLM"]),
    ],
)
def test_sweeps(text: str, key: str, values: list[Any]) -> None:
    assert cli.parse_sweep(text) == (key, values)


def test_sweep_points_are_means_over_seeds() -> None:
    def one(label: str, seed: int, right: bool, forwards: int | None) -> Run:
        summary = summarise([answer(right=right, forwards=forwards)])
        return Run(label, seed, {}, None, summary)

    runs = [one("a", 1, True, 5), one("a", 2, False, 10), one("b", 1, True, 10)]
    assert points(runs) == [("a", 1.5, 50.0), ("b", 1.0, 100.0)]
    # Ordered by TPF: (1, 100) first, (1.5, 50) is more than 5 points below it.
    assert sweep_aup(runs, None) == pytest.approx(100)
    assert "2 seeds 50.0 ± 70.7 %" in (sweep_text(runs, None) or "")
    assert sweep_aup([*runs, one("c", 1, True, None)], None) is None
    assert sweep_aup(runs[:1], None) is None


def test_store_gives_back_only_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "answers.jsonl"
    Store(path).add("s", "p", answer(3, warmup=True), {"threshold": 0.5})
    store = Store(path)
    assert store.get("s", 3, "p") == answer(3)
    assert store.effective("s") == {"threshold": 0.5}
    for other in [("t", 3, "p"), ("s", 4, "p"), ("s", 3, "q")]:
        assert store.get(*other) is None


def test_store_survives_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = Store(path)
    store.add("s", "p", answer(0))
    store.add("s", "p", answer(1))
    path.write_text(path.read_text()[:-20])
    store = Store(path)
    assert store.get("s", 0, "p") and store.get("s", 1, "p") is None
    store.add("s", "p", answer(1))
    assert Store(path).get("s", 1, "p") == answer(1)


def test_ratios_to_the_plain_loop_are_medians_of_rounds() -> None:
    base = [Pass(10, 2.0, 8, [[1, 2], [3, 4]])] * 3
    ours = [
        Pass(20, 1.0, 4, [[1, 2], [3, 4]]),
        Pass(90, 0.1, 4, [[1, 2], [9, 9]]),
        Pass(30, 0.5, 4, [[1, 2], [3, 4]]),
    ]
    figures = compare(base, ours)
    assert (figures.throughput_ratio, figures.latency_ratio) == (3, 0.25)
    # One round with one wrong answer is enough to count it.
    assert figures.equal == 1
