"""Request bodies that are refused: by field, and by the route that takes it."""

from __future__ import annotations

from typing import Any

ROUTES = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/generate",
}
MESSAGES = [{"role": "user", "content": "1+1="}]
SMALLEST: dict[str, dict[str, Any]] = {
    "chat": {"model": "demo", "messages": MESSAGES, "max_tokens": 4},
    "completions": {"model": "demo", "prompt": "1+1=", "max_tokens": 4},
    "generate": {"text": "1+1=", "sampling_params": {"max_new_tokens": 4}},
}
BIG = 2**70
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}

# Sampling fields of the same name everywhere: top level of the OpenAI routes,
# sampling_params of /generate.
SAMPLING: list[tuple[str, Any]] = [
    *(("temperature", bad) for bad in (-0.1, 2.5, "0.5", True, [], BIG)),
    *(("top_p", bad) for bad in (0, -1, 1.1, "1", True, {})),
    *(("top_k", bad) for bad in (-2, 1.5, "3", True, BIG)),
    *(("n", bad) for bad in (0, -1, 129, 1.5, "2", True, BIG)),
    *(("stop", bad) for bad in (5, True, "", [""], ["a", 5], {}, [["a"]])),
    *(("stop", bad) for bad in (["a"] * 33, "x" * 257, ["a", "x" * 257])),
    *(("stop_token_ids", bad) for bad in (5, "5", [-1], [10**6], [True], ["1"])),
    ("stop_token_ids", [1] * 257),
    *(("ignore_eos", bad) for bad in (1, "true", [])),
    *(("skip_special_tokens", bad) for bad in (0, "no")),
    *(("no_stop_trim", bad) for bad in (0, "no")),
    *(("custom_params", bad) for bad in (5, "x", [1])),
    *(("min_p", bad) for bad in (1.1, -0.1, True, False, "0", "", {}, [])),
    *(("frequency_penalty", bad) for bad in (0.5, -1, True, "1", "", {})),
    *(("presence_penalty", bad) for bad in (0.5, True, [])),
    *(("repetition_penalty", bad) for bad in (1.1, 0, True, "", {}, [])),
    *(("logit_bias", bad) for bad in (5, [], "", {"5": 101}, {"5": True})),
    *(("logit_bias", {bad: 1}) for bad in ("x", "-1", "05", str(10**6), "1" * 99)),
    *(("allowed_token_ids", bad) for bad in (5, [], "5", [-1], [10**6], [True])),
    *(("bad_words", bad) for bad in (5, "a", [""], [" "], [5], [[]], [[10**6]])),
    *(("bad_words", bad) for bad in ([[True]], ["x" * 257], ["a"] * 600)),
    *(("regex", bad) for bad in (5, True, ["a"], {"a": 1}, "a" * 65_537)),
    *(("ebnf", bad) for bad in (5, True, ["a"], {"a": 1}, "a" * 65_537)),
    *(("stop_regex", bad) for bad in ("(a+)+$", "(", ["["])),
]

OPENAI: list[tuple[str, Any]] = [
    *(("max_tokens", bad) for bad in (0, -1, BIG, 2**40, 1.5, "4", True)),
    *(("seed", bad) for bad in (1.5, "1", True, BIG, 2**63)),
    *(("stream_options", bad) for bad in (5, {"include_usage": "yes"})),
    *(("model", bad) for bad in (5, ["a"])),
    *(("user", bad) for bad in (5, ["a"])),
    *(("best_of", bad) for bad in (129, "1")),
    *(("min_tokens", bad) for bad in (-1, "1", True, BIG)),
    *(("response_format", bad) for bad in ("text", 5, {"type": "x"}, SCHEMA)),
    *(("top_logprobs", bad) for bad in (2, True, -1, 21)),
    *(("logprobs", bad) for bad in ("yes", -1, 21, [])),
    *(("return_hidden_states", bad) for bad in (True, "last")),
    *(("lora_path", bad) for bad in ("a", ["a"])),
    ("custom_logit_processor", "x"),
    ("session_params", {"id": "a"}),
    *(("rid", bad) for bad in (5, "", ["a"])),
    *(("cache_salt", bad) for bad in (5, ["a"])),
    *(("priority", bad) for bad in ("high", 2**63, True, 5, "", {})),
    ("session_id", 5),
    ("guided_json", 5),
    ("structural_tag", "x"),
    *(("truncate_prompt_tokens", bad) for bad in (4, -1)),
    *(("include_stop_str_in_output", bad) for bad in (1, "yes", {})),
    *(("do_sample", bad) for bad in (True, "true", 0, 1)),
    *(("repeat_penalty", bad) for bad in (1.3, "", True)),
    *(("num_ctx", bad) for bad in (64, 0)),
    *((field, 3) for field in ("n_predict", "num_predict", "max_length")),
    *(("use_beam_search", bad) for bad in (True, 1)),
    *(("length_penalty", bad) for bad in (0.8, {})),
    *(("typical_p", bad) for bad in (0.9, True)),
    *(("mirostat", bad) for bad in (1, 2)),
    ("xtc_probability", 0.5),
    ("dry_multiplier", 0.8),
    ("smoothing_factor", 0.2),
    ("no_repeat_ngram_size", 2),
    ("num_beams", 4),
    ("early_stopping", True),
]

CHAT: list[tuple[str, Any]] = [
    *(("messages", bad) for bad in (None, "hi", [], {}, ["hi"], 5)),
    ("role", [{"role": "alien", "content": "a"}]),
    ("role", [{"role": 5, "content": "a"}]),
    ("role", [{"content": "a"}]),
    ("content", [{"role": "user", "content": 5}]),
    ("content", [{"role": "user", "content": ["a"]}]),
    *(("max_completion_tokens", bad) for bad in (0, -1, "4", True, BIG)),
    *(("tool_choice", bad) for bad in ("required", "alien", 5)),
    *(("tools", bad) for bad in (5, "x", ["x"], [{"type": "function"}])),
    ("echo", True),
    ("add_special_tokens", True),
    ("function_call", {"name": "f"}),
    ("functions", [{"name": "f"}]),
    ("prompt_logprobs", 0),
    *(("input_ids", bad) for bad in ([], [-1], [10**6], [True], "5", [[1]])),
    *(("chat_template_kwargs", bad) for bad in (5, {"tokenize": False})),
    ("chat_template_kwargs", {"chat_template": "x"}),
]

COMPLETIONS: list[tuple[str, Any]] = [
    *(("prompt", bad) for bad in (None, "", [], [""], ["a", ""], 5, True, {})),
    *(("prompt", bad) for bad in ([[]], [[1], []], [1, "a"], [True], ["a", 5])),
    *(("prompt", bad) for bad in ([-1], [10**6], [[1], [10**6]], [1.5], [BIG])),
    ("suffix", 5),
    ("suffix", ["b"]),
    *(("echo", bad) for bad in (1, "yes")),
    *(("logprobs", bad) for bad in (True, "", 1.5)),
    ("add_special_tokens", False),
    ("json_schema", 5),
]

GENERATE: list[tuple[str, Any]] = [
    *(("text", bad) for bad in (None, "", [], ["a", ""], 5, ["a", 5], True)),
    *(("input_ids", bad) for bad in ([], [[]], [-1], [10**6], "5", [1.5], [True])),
    *(("input_ids", bad) for bad in ([BIG], [1, [2]], [[1], 2], {})),
    *(("sampling_params", bad) for bad in (5, "x", [], [{}], [5], {"alien": 1})),
    *(("rid", bad) for bad in (5, "", ["a"])),
    *(("return_logprob", bad) for bad in (1, "yes", [True])),
    *(("top_logprobs_num", bad) for bad in (2, -1, 21, True, [1])),
    *(("logprob_start_len", bad) for bad in (0, 5, [0])),
    ("token_ids_logprob", [1]),
    *(("return_hidden_states", bad) for bad in (True, "last")),
    *(("image_data", bad) for bad in ("a.png", ["a.png"])),
    *((field, ["a"]) for field in ("audio_data", "video_data")),
    ("input_embeds", [[0.5]]),
    ("lora_path", "a"),
    ("session_params", {"id": "a"}),
    ("custom_logit_processor", "x"),
    ("bootstrap_room", 5),
    ("max_thinking_tokens", 5),
    ("temperature", 0.5),
    ("custom_labels", {"a": "b"}),
]

NATIVE: list[tuple[str, Any]] = [
    *(("max_new_tokens", bad) for bad in (0, -1, BIG, 2**40, 1.5, "4", True)),
    *(("sampling_seed", bad) for bad in (1.5, "1", True, BIG, 2**63)),
    *(("min_new_tokens", bad) for bad in (-1, True, "", {}, [])),
    *((field, bad) for field, bad in (("use_beam_search", True), ("typical_p", 0.5))),
    ("json_schema", 5),
    ("structural_tag", 5),
]


def bad_bodies() -> list[tuple[str, str, dict[str, Any]]]:
    """Route, the field that its refusal names, and a body that is wrong in one field.

    All can be refused without a tokenizer; ``LATER`` cannot.
    """
    table: list[tuple[str, str, dict[str, Any]]] = []

    def add(route: str, field: str, change: dict[str, Any]) -> None:
        table.append((route, field, {**SMALLEST[route], **change}))

    for field, value in SAMPLING:
        add("chat", field, {field: value})
        add("completions", field, {field: value})
        params = {"max_new_tokens": 4, field: value}
        add("generate", field, {"sampling_params": params})
    for field, value in OPENAI:
        add("chat", field, {field: value})
        add("completions", field, {field: value})
    for field, value in CHAT:
        key = "messages" if field in ("role", "content") else field
        add("chat", field, {key: value})
    for field, value in COMPLETIONS:
        add("completions", field, {field: value})
    for field, value in NATIVE:
        add("generate", field, {"sampling_params": {field: value}})
    for field, value in GENERATE:
        prompt = {} if field in ("text", "input_ids") else {"text": "1+1="}
        named = "alien" if value == {"alien": 1} else field
        table.append(("generate", named, {**prompt, field: value}))
    return table


# SGLang's own models refuse these, or the checks that need the tokenizer: the route,
# what the refusal says, and the change of the route's smallest body.
LATER: list[tuple[str, str, dict[str, Any]]] = [
    *(("chat", "custom_params", {"custom_params": {key: 1}}) for key in ("a", "dllm")),
    ("completions", "custom_params", {"custom_params": {"threshold": 1}}),
    (
        "generate",
        "custom_params.dllm.treshold",
        {"sampling_params": {"custom_params": {"dllm": {"treshold": 1}}}},
    ),
    ("chat", "max_tokens can be 1 to", {"max_tokens": 5000}),
    ("completions", "max_tokens can be 1 to", {"max_tokens": 5000}),
    (
        "chat",
        "max_completion_tokens can be 1 to",
        {"max_tokens": None, "max_completion_tokens": 5000},
    ),
    ("completions", "this model's maximum context length is", {"prompt": [5] * 3000}),
    ("generate", "max_new_tokens", {"sampling_params": {"max_new_tokens": 5000}}),
    ("chat", "lora_path", {"model": "base:adapter"}),
    ("completions", "lora_path", {"model": "base:adapter"}),
    ("chat", "routed_dp_rank", {"routed_dp_rank": 5}),
    ("completions", "routed_dp_rank", {"routed_dp_rank": 5}),
    ("chat", "content", {"messages": [{"role": "user"}]}),
    (
        "chat",
        "content",
        {"messages": [{"role": "user", "content": [{"type": "alien"}]}]},
    ),
    (
        "chat",
        "image",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
            ]
        },
    ),
]

# Python's JSON writer produces these bodies and a strict JSON parser refuses them.
MALFORMED: list[tuple[str, str, str]] = [
    ("chat", "content", '{"messages":[{"role":"user","content":"\\ud800"}]}'),
    ("chat", "stop", '{"messages":[{"role":"user","content":"a"}],"stop":"\\ud800"}'),
    ("chat", "model", '{"model":"\\ud800","messages":[]}'),
    ("chat", "user", '{"user":"\\udfff","messages":[]}'),
    ("chat", "temperature", '{"temperature":NaN,"messages":[]}'),
    ("chat", "body", '{"messages":'),
    ("chat", "body", "[]"),
    ("chat", "body", "null"),
    ("chat", "body", '"x"'),
    ("completions", "prompt", '{"prompt":"\\ud800"}'),
    ("completions", "top_p", '{"prompt":"a","top_p":Infinity}'),
    ("completions", "temperature", '{"prompt":"a","temperature":1e999}'),
    ("completions", "body", "[" * 3000 + "]" * 3000),
    ("completions", "body", "5"),
    ("completions", "body", '{"prompt":"a",}'),
    ("generate", "text", '{"text":"\\ud800"}'),
    ("generate", "stop", '{"text":"a","sampling_params":{"stop":["\\ud800"]}}'),
    ("generate", "temperature", '{"text":"a","sampling_params":{"temperature":NaN}}'),
    ("generate", "rid", '{"text":"a","rid":"\\ud800"}'),
    ("generate", "body", "{"),
    ("generate", "body", "true"),
]
