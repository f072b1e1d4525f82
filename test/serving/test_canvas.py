"""The canvas of a request: its parts, drafts, lengths, and the gaps of its answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from sglang_dllm.config.canvas_parts import MASK, CanvasParts
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.demo import demo_path
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.body import ServedModel, check_body
from sglang_dllm.serving.canvas import canvas_of, infill_parts, read_canvas
from sglang_dllm.serving.gaps import GapAnswers
from sglang_dllm.serving.validation import CapacityLimits, check_request

TOKENIZER = AutoTokenizer.from_pretrained(demo_path())
VOCAB, MOST = len(TOKENIZER), 200
LLADA = FAMILIES["LLaDAModelLM"]
DECODE = parse_decode_config("FullAttnMultiBlock", LLADA, {})
FACTS = ModelFacts(LLADA, mask_id=9, eos_ids=(5,), vocab_size=VOCAB, newline_ids=(7,))
MODEL = ServedModel(vocab_size=VOCAB, defaults={"temperature": 0.25})
MESSAGES = [{"role": "user", "content": "a"}]


def read(*parts: Any) -> CanvasParts:
    return read_canvas(list(parts), TOKENIZER, VOCAB, MOST)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


def test_parts_are_joined_as_each_is_alone() -> None:
    found = read("12 +", {"mask": 2}, {"text": " = 42"}, {"ids": [1, 2]}, {"mask": 1})
    text = [*ids("12 +"), MASK, MASK, *ids(" = 42"), 1, 2, MASK]
    assert list(found.template) == text
    assert found.num_shown == len(text)
    start = len(ids("12 +"))
    assert found.gaps == [(start, start + 2), (len(text) - 1, len(text))]


def test_masks_side_by_side_are_one_gap() -> None:
    assert read({"mask": 2}, {"mask": 3}).gaps == [(0, 5)]


def test_the_resolved_form_reads_as_itself() -> None:
    for parts in (
        ["a", {"mask": 3}, {"ids": [4]}, {"mask": 1}],
        [{"mask": 3}, {"text": "b c", "shown": False}],
        [{"text": "a b", "mask": [[0, 1]]}, {"ids": [4, 5], "shown": False}, "c"][:2],
    ):
        found = read(*parts)
        assert read(*found.parts) == found == CanvasParts.of(found.parts)


def test_text_behind_the_answer_is_not_shown() -> None:
    found = read(*infill_parts(4, " books."))
    assert found.num_shown == 4
    assert list(found.template) == [MASK] * 4 + ids(" books.")
    assert [found.decoded_len(size) for size in (1, 3, 32)] == [4, 6, 6]


@pytest.mark.parametrize(
    ("span", "masked"),
    [
        ([0, 1], ["Tom"]),  # widened to the token
        ([2, 5], ["Tom", " has"]),
        ([3, 4], [" has"]),  # the space belongs to the word behind it
        ([8, 10], [" 2", "3"]),
        ([9, 10], ["3"]),
        ([10, 18], [" apples", "."]),
    ],
)
def test_a_span_of_a_draft_masks_every_token_that_it_touches(
    span: list[int], masked: list[str]
) -> None:
    draft = "Tom has 23 apples."
    found = read({"text": draft, "mask": [span]})
    pairs = zip(ids(draft), found.template, strict=True)
    gone = [token for token, now in pairs if now == MASK]
    assert [TOKENIZER.decode([token]) for token in gone] == masked
    assert len(found.gaps) == 1


def test_characters_outside_of_the_vocabulary_are_masked_whole() -> None:
    draft = "é has"
    found = read({"text": draft, "mask": [[0, 1]]})
    num = len("é".encode())
    assert list(found.template) == [MASK] * num + ids(draft)[num:]


def test_a_draft_of_ids_is_masked_by_position() -> None:
    found = read({"ids": [1, 2, 3, 4], "mask": [[0, 1], [2, 4]]})
    assert found.template == (MASK, 2, MASK, MASK)
    assert found.gaps == [(0, 1), (2, 4)]


FIELD = "custom_params.dllm.canvas"
PART = 'expected a string, {"text": ...}, {"ids": [...]} or {"mask": n}'
SPANS = "ascending spans [start, end] that do not overlap, with 0 <= start < end"
BAD = [
    ([], f"{FIELD}=[] is not allowed; expected a list of at least 1 part"),
    ("text", f"{FIELD}='text' is not allowed; expected a list of at least 1 part"),
    ({"mask": 3}, f"{FIELD}={{'mask': 3}} is not allowed; expected a list"),
    (["text"], f"{FIELD}=['text'] is not allowed; expected at least 1 mask"),
    ([3], f"{FIELD}[0]=3 is not allowed; {PART}"),
    ([None, {"mask": 1}], f"{FIELD}[0]=None is not allowed; {PART}"),
    ([{}], f"{FIELD}[0]={{}} is not allowed; {PART}"),
    ([{"gap": 1}], f"{FIELD}[0]={{'gap': 1}} is not allowed; {PART}"),
    ([{"text": "a", "ids": [1]}], f"is not allowed; {PART}"),
    ([{"mask": 0}], f"{FIELD}[0].mask=0 is not allowed; expected an integer, 1 to 200"),
    ([{"mask": -1}], f"{FIELD}[0].mask=-1 is not allowed; expected an integer, 1 to"),
    ([{"mask": 201}], f"{FIELD}[0].mask=201 is not allowed; expected an integer, 1 to"),
    ([{"mask": True}], f"{FIELD}[0].mask=True is not allowed; expected an integer"),
    ([{"mask": 1.0}], f"{FIELD}[0].mask=1.0 is not allowed; expected an integer"),
    ([{"mask": "2"}], f"{FIELD}[0].mask='2' is not allowed; expected an integer"),
    ([{"mask": 10**30}], "is not allowed; expected an integer, 1 to 200"),
    ([{"mask": 150}, {"mask": 51}], f"{FIELD}[1]={{'mask': 51}} is not allowed"),
    ([{"ids": []}], f"{FIELD}[0].ids=[] is not allowed; expected a list of at least"),
    ([{"ids": ["1"]}], f"{FIELD}[0].ids=['1'] is not allowed; expected a list of at"),
    ([{"ids": [True]}], f"{FIELD}[0].ids=[True] is not allowed; expected a list of at"),
    ([{"ids": [-1]}], f"{FIELD}[0].ids: token id -1 is outside the vocabulary"),
    ([{"ids": [VOCAB]}], f"{FIELD}[0].ids: token id {VOCAB} is outside the vocabulary"),
    ([{"text": ""}], f"{FIELD}[0].text='' is not allowed; expected a non-empty string"),
    ([""], f"{FIELD}[0].text='' is not allowed; expected a non-empty string"),
    ([{"text": 5}], f"{FIELD}[0].text=5 is not allowed; expected a non-empty string"),
    (
        [{"text": "ab", "mask": 1}],
        f"{FIELD}[0].mask=1 is not allowed; expected {SPANS}",
    ),
    ([{"text": "ab", "mask": [1]}], f"{FIELD}[0].mask=1 is not allowed; expected"),
    ([{"text": "ab", "mask": [[1, 1]]}], f"{SPANS} <= 2"),
    ([{"text": "ab", "mask": [[0, 3]]}], f"{SPANS} <= 2"),
    ([{"text": "ab", "mask": [[-1, 2]]}], f"{SPANS} <= 2"),
    ([{"text": "ab", "mask": [[1, 2], [0, 1]]}], f"{SPANS} <= 2"),
    ([{"text": "ab", "mask": [[0, 2], [1, 2]]}], f"{SPANS} <= 2"),
    ([{"ids": [1, 2], "mask": [[0, True]]}], f"{FIELD}[0].mask=[0, True] is not"),
    ([{"mask": 1, "shown": 1}], f"{FIELD}[0].shown=1 is not allowed; expected true or"),
    ([{"mask": 1, "shown": False}], f"{FIELD}[0].shown=False is not allowed; expected"),
    (
        [{"text": "a", "shown": False}, {"mask": 1}],
        f"{FIELD}[0].shown=False is not allowed; expected nothing before a part that",
    ),
]


@pytest.mark.parametrize(("parts", "message"), BAD)
def test_bad_parts_are_refused_by_name(parts: Any, message: str) -> None:
    with pytest.raises(BadRequest) as error:
        read_canvas(parts, TOKENIZER, VOCAB, MOST)
    assert message in str(error.value)
    assert str(error.value).startswith(FIELD)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(BadRequest, match="expected ids: the server has no tokenizer"):
        read_canvas(["a", {"mask": 1}], None, VOCAB, MOST)
    assert read_canvas([{"ids": [1]}, {"mask": 1}], None, VOCAB, MOST).num_shown == 2


def checked(canvas: CanvasParts, **params: Any) -> dict[str, Any]:
    check_request(params, [1] * 10, CapacityLimits(95), DECODE, FACTS, canvas)
    return params


def test_the_canvas_gives_the_length_and_travels_with_the_options() -> None:
    canvas = read({"mask": 3}, {"text": " books.", "shown": False})
    params = checked(canvas, custom_params={"dllm": {"canvas": [{"mask": 3}]}})
    assert params["max_new_tokens"] == 3
    options = params["custom_params"]["dllm"]
    assert options["canvas"] == canvas.parts
    assert options["algorithm"] == "FullAttnMultiBlock"
    again = dict(params)
    check_request(again, [1] * 10, CapacityLimits(95), DECODE, FACTS, canvas)
    assert again == params


def test_steps_are_those_of_the_part_that_has_masks() -> None:
    canvas = read({"mask": 3}, {"ids": [1] * 60, "shown": False})
    options = {"algorithm": "LLaDA", "block_size": 4, "steps": 2}
    found = checked(canvas, custom_params={"dllm": options})
    assert found["custom_params"]["dllm"]["steps"] == 2


@pytest.mark.parametrize(
    ("canvas", "params", "message"),
    [
        ([{"mask": 3}], {"max_new_tokens": 4}, "max_new_tokens=4 is not allowed"),
        ([{"mask": 90}], {}, "the canvas has 90 tokens behind a prompt of 10"),
        ([{"mask": 9}, {"ids": [1] * 81, "shown": False}], {}, "has 90 tokens behind"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(
    canvas: list[Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest) as error:
        checked(read(*canvas), **params)
    assert message in str(error.value)


def test_a_suffix_is_text_behind_the_masks() -> None:
    body = {"prompt": "a", "suffix": " b", "max_tokens": 7}
    found = check_body("/v1/completions", body, MODEL)
    assert "suffix" not in found
    assert canvas_of(found["custom_params"]) == infill_parts(7, " b")
    found = check_body("/v1/completions", {"prompt": "a", "suffix": " b"}, MODEL)
    assert canvas_of(found["custom_params"]) == infill_parts(16, " b")
    options = {"dllm": {"algorithm": "LLaDA"}}
    found = check_body("/v1/completions", {**body, "custom_params": options}, MODEL)
    assert found["custom_params"]["dllm"]["algorithm"] == "LLaDA"
    for nothing in ("", None):
        found = check_body("/v1/completions", {**body, "suffix": nothing}, MODEL)
        assert found.get("custom_params") is None


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": 5}, "suffix=5 is not allowed"),
        (
            "/v1/completions",
            {
                "prompt": "a",
                "suffix": "b",
                "custom_params": {"dllm": {"canvas": [{"mask": 1}]}},
            },
            f"suffix='b' is not allowed; expected nothing beside {FIELD}",
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "suffix": "b"},
            f"suffix='b' is not allowed; expected nothing: {FIELD} has a place for it",
        ),
        ("/generate", {"text": "a", "suffix": "b"}, "suffix='b' is not allowed"),
        *(
            (path, body | {"custom_params": {"dllm": {"canvas": [{"mask": 1}]}}}, name)
            for path, body, name in (
                ("/v1/responses", {"input": "a"}, "custom_params"),
                (
                    "/v1/messages",
                    {"model": "m", "max_tokens": 3, "messages": MESSAGES},
                    "custom_params",
                ),
            )
        ),
    ],
)
def test_a_route_that_cannot_carry_it_refuses_it(
    path: str, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest) as error:
        check_body(path, body, MODEL)
    assert str(error.value).startswith(message)


def answers(
    canvas: CanvasParts, *, stream: bool = False, incremental: bool = False, **more: Any
) -> GapAnswers:
    params = {"custom_params": {"dllm": {"canvas": canvas.parts}}, **more}
    obj = SimpleNamespace(rid="r", sampling_params=params, stream=stream)
    return GapAnswers(manager(incremental), obj)


def manager(incremental: bool = False) -> Any:
    return SimpleNamespace(
        tokenizer=TOKENIZER, incremental_streaming_output=incremental
    )


def output(tokens: list[int], text: str | None = None, ended: bool = True) -> Any:
    reason = {"type": "stop"} if ended else None
    meta = {"id": "r", "prompt_tokens": 7, "completion_tokens": len(tokens)}
    return {
        "text": TOKENIZER.decode(tokens) if text is None else text,
        "output_ids": list(tokens),
        "meta_info": {**meta, "finish_reason": reason},
    }


DRAFT = "Tom has 23 apples. He buys 15 more."
FILLED = ids(DRAFT)


def two_gaps() -> CanvasParts:
    return read({"text": DRAFT, "mask": [[7, 10], [26, 29]]})


def gap(canvas: CanvasParts, number: int, text: str) -> dict[str, Any]:
    start, end = canvas.gaps[number]
    return {"start": start, "end": end, "ids": FILLED[start:end], "text": text}


def test_an_answer_has_its_gaps_and_its_counts() -> None:
    canvas, out = two_gaps(), output(FILLED)
    found = answers(canvas).add(out)
    assert found == [gap(canvas, 0, " 23"), gap(canvas, 1, " 15")]
    assert out["meta_info"]["completion_tokens"] == 4
    assert out["meta_info"]["prompt_tokens"] == 7 + len(FILLED) - 4


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stream_has_each_gap_once_when_it_is_final(incremental: bool) -> None:
    canvas = two_gaps()
    gaps, seen = answers(canvas, stream=True, incremental=incremental), []
    for end in range(1, len(FILLED) + 1):
        out = output(FILLED[:end], ended=end == len(FILLED))
        if incremental:
            out["output_ids"] = FILLED[end - 1 : end]
            out["text"] = TOKENIZER.decode(FILLED[end - 1 : end])
        found = gaps.add(out)
        assert out["meta_info"]["completion_tokens"] == canvas.num_masks(end)
        seen += [(end, one["text"]) for one in found or []]
    (_, first), (_, second) = canvas.gaps
    assert seen == [(first, " 23"), (second, " 15")]


def test_a_stream_has_a_gap_that_is_final_before_its_text() -> None:
    canvas = two_gaps()
    start, end = canvas.gaps[1]
    gaps = answers(canvas, stream=True)
    final = [[1, FILLED[start:end]]]
    early = gaps.add(output(FILLED[:2], ended=False), final)
    assert early == [gap(canvas, 1, " 15")]
    last = gaps.add(output(FILLED), [[0, FILLED[slice(*canvas.gaps[0])]], *final])
    assert last == [gap(canvas, 0, " 23")]


def test_an_answer_that_ends_early_has_the_gaps_that_it_reached() -> None:
    canvas = two_gaps()
    start, _ = canvas.gaps[0]
    (found,) = answers(canvas).add(output(FILLED[: start + 1])) or []
    assert found == {
        "start": start, "end": start + 1, "ids": FILLED[start : start + 1], "text": " 2"
    }  # fmt: skip
    assert answers(canvas).add(output(FILLED[: start - 1])) == []


def test_a_stop_string_cuts_the_text_of_its_gap() -> None:
    canvas = read("Tom", {"mask": 4})
    tokens = ids("Tom has 23 apples")
    (found,) = answers(canvas).add(output(tokens, "Tom has")) or []
    assert found["text"] == " has"


def test_special_tokens_are_left_out_of_the_text() -> None:
    eos = TOKENIZER.eos_token_id
    canvas = read({"mask": 3}, " books.")
    tokens = [*ids("12"), eos, *ids(" books.")]
    (found,) = answers(canvas).add(output(tokens, "12 books.")) or []
    assert found["text"] == "12" and found["ids"] == [*ids("12"), eos]


def test_another_request_has_no_gaps() -> None:
    obj = SimpleNamespace(rid="r", sampling_params={}, stream=False)
    out = output(FILLED)
    assert GapAnswers(manager(), obj).add(out) is None
    assert out["meta_info"]["completion_tokens"] == len(FILLED)
