"""All checks of one server's requests, made from SGLang's tokenizer manager.

A request passes up to three of them. The JSON body of a route is checked before
SGLang's own models read it (``check_json``). A request of any route, or of the Python
engine, is checked before SGLang unfolds it (``check_arguments``), and each of its
prompts once it is tokenized (``check_prompt``), where its options are resolved.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Awaitable, Callable
from json import JSONDecodeError
from typing import Any
from weakref import WeakKeyDictionary

from sglang_dllm.config.canvas_parts import CanvasParts
from sglang_dllm.config.refusals import Refusals
from sglang_dllm.config.scoring import score_of
from sglang_dllm.config.server import decodes, load_decode_config
from sglang_dllm.models.facts import FAMILIES, ModelFacts
from sglang_dllm.models.tokenizers import tokenizer_of
from sglang_dllm.serving.best_of import BEST_OF
from sglang_dllm.serving.body import (
    CHECKS,
    ServedModel,
    check_body,
    check_generate,
)
from sglang_dllm.serving.body_limits import check_parts
from sglang_dllm.serving.canvas import (
    PART_FIELDS,
    canvas_of,
    check_length,
    read_canvas,
)
from sglang_dllm.serving.copies import unfold_copies
from sglang_dllm.serving.fields import NAMES
from sglang_dllm.serving.forms import forms_in, read_forms
from sglang_dllm.serving.raw_body import explain_malformed
from sglang_dllm.serving.request_ids import RequestIds
from sglang_dllm.serving.sampling_defaults import (
    SamplingDefaults,
    generation_config_of,
)
from sglang_dllm.serving.scoring import check_score, prepare_scores
from sglang_dllm.serving.token_fields import with_word_ids
from sglang_dllm.serving.token_ids_only import refuse_text
from sglang_dllm.serving.validation import (
    LENGTH_FIELD,
    CapacityLimits,
    check_request,
)
from sglang_dllm.upstream.compat import in_effect

logger = logging.getLogger(__name__)
_LENGTH_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")

# SGLang's own routes set these fields of a request, a client does not.
_INTERNAL = ("received_time", "external_trace_header", "custom_labels", "modalities")


class RequestChecks:
    """The checks, with what they need to know of the model and of the server."""

    def __init__(self, manager: Any) -> None:
        config, args = manager.model_config, in_effect(manager.server_args)
        hf_config = config.hf_config
        self.manager = manager
        self.ids = RequestIds()
        # SGLang makes the collector with --enable-metrics alone.
        collector = getattr(manager, "metrics_collector", None)
        self.refusals = Refusals(collector, NAMES)
        self.model = ServedModel(
            vocab_size=config.vocab_size,
            defaults=SamplingDefaults.of_server(
                manager.preferred_sampling_params, generation_config_of(config)
            ).to_dict(),
            template_names=_words(getattr(manager.tokenizer, "chat_template", None)),
            has_reasoning=bool(args.reasoning_parser),
            has_tool_calls=bool(args.tool_call_parser),
        )
        self.decode = load_decode_config(
            args.dllm_algorithm,
            FAMILIES[hf_config.architectures[0]],
            args.dllm_algorithm_config,
        )
        tokenizer = tokenizer_of(manager.tokenizer, args)
        facts = ModelFacts.from_hf_config(hf_config)
        for difference in facts.differences_from(tokenizer):
            logger.warning("%s", difference)
        self.facts = facts.with_tokenizer(tokenizer)

    async def check_json(self, request: Any, read: Callable[[], Awaitable[Any]]) -> Any:
        """The body of an HTTP request: checked, with the sampling defaults.

        The prompts of a streamed /generate are checked here too, because SGLang
        answers it with status 200 before the tokenizer manager sees it.

        Args:
            request: Starlette's request.
            read: SGLang's own way to parse its body.

        Raises:
            BadRequest: status 400, naming field, value and range.
        """
        # The route's own path: the request's may have a proxy's prefix.
        path = request.scope["route"].path
        if path in CHECKS:
            self.ids.arrive()
        try:
            body = await read()
        except JSONDecodeError as error:
            problem = f"{error.msg} at character {error.pos}"
            raise explain_malformed(await request.body(), problem) from None
        check_parts(body)
        if self.manager.tokenizer is None:
            refuse_text(path, body)
        is_completion = path == "/v1/completions" and isinstance(body, dict)
        if is_completion and body.get("suffix"):
            PART_FIELDS.set(("max_tokens", "suffix"))
        body = check_body(path, body, self.model)
        if path in CHECKS:
            has_parser = self.model.has_tool_calls
            await read_forms(forms_in(body, has_parser=has_parser))
        if is_completion:
            BEST_OF.set(body.pop("best_of", 1))
            body = self._with_canvas_len(body)
        named = [x for x in _LENGTH_FIELDS if isinstance(body, dict) and x in body]
        if named:
            LENGTH_FIELD.set(named[0])
        if path == "/generate" and body.get("stream"):
            self.ids.check_unused(body.get("rid"))
            await self._check_prompts(body)
        return body

    def _with_canvas_len(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion with the length of its canvas: SGLang has a default of 16."""
        canvas = self._canvas_of(body.get("custom_params"))
        if canvas is None:
            return body
        check_length("max_tokens", body.get("max_tokens"), canvas)
        return {**body, "max_tokens": canvas.num_shown}

    async def _check_prompts(self, body: dict[str, Any]) -> None:
        """Check the prompts of a native body; the body stays as it is."""
        prompts = body["input_ids"] if "input_ids" in body else body["text"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        given = body.get("sampling_params") or {}
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                prompt, _ = await self.manager._tokenize_texts(prompt)
            params = given[i] if isinstance(given, list) else given
            self.check_prompt(dict(params), list(prompt))

    def check_arguments(self, obj: Any) -> None:
        """Check a GenerateReqInput and give it the sampling defaults, in place.

        Prompts of one request share its parameters. Each gets its own dict, because
        the answer length that is filled in depends on the prompt. A request for several
        answers becomes a batch (``serving.copies``).

        Raises:
            BadRequest: naming field, value and range.
        """
        fields = {
            field.name: getattr(obj, field.name)
            for field in dataclasses.fields(obj)
            if field.name not in _INTERNAL
        }
        found = check_generate(fields, self.model.vocab_size)
        given = found.get("sampling_params", {})
        given = prepare_scores(obj, given, self.manager.tokenizer)
        prompts = obj.text if obj.text is not None else obj.input_ids
        if isinstance(given, list):
            obj.sampling_params = [self._with_defaults(one) for one in given]
        elif isinstance(prompts, str) or isinstance(prompts[0], int):
            obj.sampling_params = self._with_defaults(given)
        else:
            obj.sampling_params = [self._with_defaults(given) for _ in prompts]
        unfold_copies(obj, BEST_OF.get())

    async def check_forms(self, obj: Any) -> bool:
        """Read the forms that the answers of a GenerateReqInput must have.

        Returns:
            True if there are any, so that time has passed.

        Raises:
            BadRequest: a form is wrong or is not served.
        """
        forms = forms_in({"sampling_params": obj.sampling_params})
        await read_forms(forms)
        return bool(forms)

    def check_early(self, obj: Any) -> None:
        """Check a GenerateReqInput before its stream begins; it stays as it is.

        Raises:
            BadRequest: naming field, value and range.
        """
        obj = copy.copy(obj)
        with self.refusals.counted("arguments"):
            self.check_arguments(obj)
            if obj.input_ids is not None:
                self.check_prompt(dict(obj.sampling_params), obj.input_ids)

    def _with_defaults(self, params: dict[str, Any]) -> dict[str, Any]:
        return {**self.model.defaults, **params}

    def check_prompt(self, params: dict[str, Any], input_ids: Any) -> None:
        """Check one prompt and resolve its options, in place in ``params``.

        Raises:
            BadRequest: naming field, value and range.
        """
        manager = self.manager
        self._prefer(params, "custom_params")
        canvas = self._canvas_of(params.get("custom_params"))
        if canvas is None:
            self._prefer(params, "max_new_tokens")
        args = in_effect(manager.server_args)
        limits = CapacityLimits(
            manager.max_req_input_len,
            args.page_size,
            args.max_running_requests,
            args.allow_auto_truncate,
        )
        if score_of(params.get("custom_params")) is not None:
            check_score(params, input_ids, limits, self.facts)
            return
        params["custom_params"] = with_word_ids(
            params.get("custom_params"), manager.tokenizer
        )
        check_request(params, input_ids, limits, self.decode, self.facts, canvas)

    def _prefer(self, params: dict[str, Any], key: str) -> None:
        """Fill in what the server prefers where the request says nothing."""
        preferred = (self.manager.preferred_sampling_params or {}).get(key)
        if params.get(key) is None and preferred is not None:
            params[key] = preferred

    def _canvas_of(self, custom_params: Any) -> CanvasParts | None:
        """The answer where a request gives a part of it."""
        given = canvas_of(custom_params)
        if given is None:
            return None
        manager = self.manager
        most = manager.max_req_input_len
        return read_canvas(given, manager.tokenizer, self.model.vocab_size, most)


def _words(template: Any) -> frozenset[str]:
    """The words of a chat template; a tokenizer may have several, by name."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return frozenset(re.findall(r"\w+", " ".join(texts)))


_CHECKS: WeakKeyDictionary[Any, RequestChecks] = WeakKeyDictionary()
"""By manager. A process may have several engines, one behind the other."""


def checks_of(manager: Any) -> RequestChecks | None:
    """The checks of a tokenizer manager; None where the model is not ours."""
    architectures = getattr(manager.model_config.hf_config, "architectures", None)
    algorithm = manager.server_args.dllm_algorithm
    if not decodes(algorithm, (architectures or [None])[0]):
        return None
    checks = _CHECKS.get(manager)
    if checks is None:
        checks = _CHECKS[manager] = RequestChecks(manager)
    return checks


def checks_of_server() -> RequestChecks | None:
    """The checks of the HTTP server of this process.

    None before it has started, and where the model is not ours.
    """
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    return None if state is None else checks_of(state.tokenizer_manager)
