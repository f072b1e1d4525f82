"""A watched canvas through the real server: drafts in a stream, traces, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import requests
from openai import OpenAI

from helpers.serving_harness import Server
from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.models.facts import FAMILIES

QUESTION = "Tom has 62 apples. He buys 25 more. He sells 34. How many apples has Tom?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
LLADA: dict[str, Any] = {"algorithm": "LLaDA", "block_size": 16}
DRAFT = {"custom_params": {"dllm": LLADA | {"stream": "draft"}}}
PLAIN = {"custom_params": {"dllm": LLADA}}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none") as client:
        yield client


class Redrawn:
    """The canvas that a client draws from the drafts that it gets."""

    def __init__(self) -> None:
        self.cells: list[Sequence[Any] | None] = []
        self.steps: list[dict[str, Any]] = []
        self.forward = 0

    def take(self, draft: Mapping[str, Any]) -> None:
        if "start" in draft:
            assert not self.cells
            self.cells = [None] * draft["start"]["answer_len"]
        for step in draft["steps"]:
            self._take(step)
        masked = [i for start, end in draft["masked"] for i in range(start, end)]
        assert masked == [i for i, cell in enumerate(self.cells) if cell is None]
        assert len(self.cells) == draft["answer_len"]

    def _take(self, step: dict[str, Any]) -> None:
        self.steps.append(step)
        if "resized" in step:
            at, removed, inserted = step["resized"]
            self.cells[at : at + removed] = [None] * inserted
            assert step["forward"] == self.forward
            return
        assert step["forward"] == self.forward + 1
        self.forward += 1
        for position, token, text, confidence in step["committed"]:
            assert isinstance(token, int)
            assert confidence is None or 0 <= confidence <= 1
            assert confidence is None or self.cells[position] is None
            self.cells[position] = (text, confidence)

    @property
    def text(self) -> str:
        """Up to the end of the answer."""
        found = "".join("░" if cell is None else cell[0] for cell in self.cells)
        return found.split("<|")[0]


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_stock_clients_read_a_stream_of_drafts(client: OpenAI, route: str) -> None:
    """The same text, end and counts as without; the extension comes beside them."""
    ask: Any = client.chat.completions if route == "chat" else client.completions
    asked = {"messages": MESSAGES} if route == "chat" else {"prompt": QUESTION}
    common: dict[str, Any] = {"model": "demo", "max_tokens": 48, **asked}
    redrawn, text, reasons, usage = Redrawn(), "", [], None
    num_empty = 0
    for part in ask.create(**common, **STREAM, extra_body=DRAFT):
        extension = (part.model_extra or {}).get("dllm")
        delta = ""
        for choice in part.choices:
            delta = (choice.delta.content if route == "chat" else choice.text) or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        text += delta
        num_empty += bool(extension and not delta)
        if extension is not None:
            redrawn.take(extension["draft"])
        usage = part.usage or usage
    whole = ask.create(**common, extra_body=PLAIN)
    choice = whole.choices[0]
    assert text == (choice.message.content if route == "chat" else choice.text)
    assert reasons == [choice.finish_reason]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert text and redrawn.text.startswith(text)
    assert num_empty > 0, "a draft comes also where no text is final yet"


def test_a_stream_that_asks_for_no_draft_stays_as_it_is(demo_server: Server) -> None:
    """Two streams, one with drafts: they have the same fields but for these."""
    for path, asked in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": QUESTION}),
    ):
        common = {**asked, **STREAM, "model": "demo", "max_tokens": 48}
        plain = demo_server.events(path, **common, **PLAIN)
        assert all("dllm" not in part for part in plain)
        drafts = demo_server.events(path, **common, **DRAFT)
        keys = {frozenset(part) for part in plain}
        assert {frozenset(part.keys() - {"dllm"}) for part in drafts} <= keys
        assert len(drafts) > len(plain)


@pytest.mark.parametrize(
    "options",
    [
        LLADA,
        {"block_size": 8, "length": "append"},
        {"algorithm": "Credit", "cache": "dual", "block_size": 8},
        {"algorithm": "LLaDA", "cfg_scale": 1.5, "steps": 16},
    ],
)
def test_the_trace_is_the_sum_of_the_drafts(
    demo_server: Server, options: dict[str, Any]
) -> None:
    watch = {"stream": "draft", "trace": True}
    params: dict[str, Any] = {"max_new_tokens": 32, "temperature": 0}
    parts = demo_server.events(
        "/generate",
        text=QUESTION,
        sampling_params={**params, "custom_params": {"dllm": options | watch}},
    )
    redrawn = Redrawn()
    for part in parts:
        redrawn.take(part["meta_info"]["dllm"]["draft"])
    assert all("trace" not in part["meta_info"]["dllm"] for part in parts[:-1])
    trace = parts[-1]["meta_info"]["dllm"]["trace"]
    assert (trace["format"], trace["version"]) == ("sglang-dllm-trace", 1)
    assert trace["steps"] == redrawn.steps
    assert redrawn.forward == parts[-1]["meta_info"]["num_forwards"]
    assert trace["dllm"]["algorithm"] == options.get("algorithm", "FullAttnMultiBlock")
    assert trace["prompt_len"] == parts[-1]["meta_info"]["prompt_tokens"]
    decided = [one for s in trace["steps"] for one in s["committed"] if one[3]]
    assert len(decided) == parts[-1]["meta_info"]["num_committed_tokens"]

    # The same request unwatched gives the same, and says nothing of it.
    plain = demo_server.post(
        "/generate",
        text=QUESTION,
        sampling_params={**params, "custom_params": {"dllm": options}},
    ).json()
    assert plain["output_ids"] == parts[-1]["output_ids"]
    assert plain["meta_info"]["num_forwards"] == redrawn.forward
    assert not {"trace", "draft", "stream"} & plain["meta_info"]["dllm"].keys()


def test_each_answer_has_its_own_trace(demo_server: Server, client: OpenAI) -> None:
    body: dict[str, Any] = {"custom_params": {"dllm": {"trace": True}}}
    one = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=32, extra_body=body
    )
    trace = (one.model_extra or {})["dllm"]["trace"]
    again = demo_server.post(
        "/invocations", messages=MESSAGES, max_tokens=32, **body
    ).json()
    assert again["dllm"]["trace"] == trace
    two: Any = client.completions.create(
        model="demo", prompt=[QUESTION, "Q: 3 + 4"], max_tokens=32, extra_body=body
    )
    traces = two.model_extra["dllm"]["trace"]
    assert len(traces) == len(two.choices) == 2
    assert traces[0]["prompt_len"] != traces[1]["prompt_len"]
    sampled = demo_server.events(
        "/v1/chat/completions",
        messages=MESSAGES,
        max_tokens=16,
        n=2,
        temperature=1,
        seed=3,
        **DRAFT,
    )
    redrawn = Redrawn(), Redrawn()
    for part in sampled:
        if "dllm" in part:
            redrawn[part["choices"][0]["index"]].take(part["dllm"]["draft"])
    for i, mine in enumerate(redrawn):
        deltas = [c["delta"] for p in sampled for c in p["choices"] if c["index"] == i]
        text = "".join(delta.get("content") or "" for delta in deltas)
        assert text and mine.text.startswith(text)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, "it with stream=true"),
        ("/v1/completions", {"prompt": "a"}, "it with stream=true"),
        ("/generate", {"text": "a"}, "it with stream=true"),
        ("/generate", {"text": ["a", "b"]}, "it with stream=true"),
        ("/api/chat", {"messages": MESSAGES, "model": "demo"}, "it on /v1/chat"),
        ("/api/generate", {"prompt": "a", "model": "demo"}, "it on /v1/chat"),
        (
            "/v1/messages",
            {"messages": MESSAGES, "model": "demo", "max_tokens": 8},
            "it on /v1/chat",
        ),
        ("/v1/responses", {"input": "a", "model": "demo"}, "it on /v1/chat"),
    ],
)
def test_where_no_draft_can_come_it_is_refused_by_name(
    demo_server: Server, path: str, body: dict[str, Any], message: str
) -> None:
    asked = DRAFT if path != "/generate" else {"sampling_params": DRAFT}
    answer = demo_server.post(path, **body, **asked)
    assert answer.status_code == 400, answer.text
    assert "custom_params" in answer.text and message in answer.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"trace": 1}, "custom_params.dllm.trace=1 "),
        ({"trace": "yes"}, "custom_params.dllm.trace='yes'"),
        ({"stream": "drafts"}, "custom_params.dllm.stream='drafts'"),
        ({"stream": True}, "custom_params.dllm.stream=True"),
    ],
)
def test_wrong_values_are_named(
    demo_server: Server, options: dict[str, Any], named: str
) -> None:
    for stream in (False, True):
        answer = demo_server.post(
            "/v1/chat/completions",
            messages=MESSAGES,
            stream=stream,
            custom_params={"dllm": options},
        )
        assert answer.status_code == 400 and named in answer.text, answer.text


def test_null_and_false_ask_for_nothing(demo_server: Server) -> None:
    answer = demo_server.post(
        "/v1/chat/completions",
        messages=MESSAGES,
        max_tokens=16,
        custom_params={"dllm": {"trace": False, "stream": None}},
    )
    assert answer.status_code == 200 and "dllm" not in answer.json()


def test_an_abort_of_a_watched_stream_frees_it(demo_server: Server) -> None:
    slow = {"algorithm": "LLaDA", "stream": "draft", "trace": True}
    with requests.post(
        f"{demo_server.base_url}/generate",
        json={
            "text": QUESTION,
            "stream": True,
            "sampling_params": {
                "max_new_tokens": 400,
                "ignore_eos": True,
                "custom_params": {"dllm": slow},
            },
        },
        stream=True,
        timeout=60,
    ) as answer:
        next(answer.iter_lines())
    assert demo_server.wait_until_idle()["num_used_tokens"] == 0


def test_the_list_of_algorithms_is_what_the_server_takes(demo_server: Server) -> None:
    found = requests.get(f"{demo_server.base_url}/dllm/algorithms", timeout=30).json()
    assert found["model"] == "demo" and found["default"] == "FullAttnMultiBlock"
    server = parse_decode_config("FullAttnMultiBlock", FAMILIES["LLaDAModelLM"], {})
    for one in found["algorithms"]:
        given = {o["name"]: o["default"] for o in one["options"]}
        kept = {key: value for key, value in given.items() if value is not None}
        for cache in one["caches"]:
            server.resolve({"algorithm": one["name"], "cache": cache, **kept})
    page = requests.get(f"{demo_server.base_url}/dllm", timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    # Nothing is fetched from another host.
    assert "://" not in page.text
