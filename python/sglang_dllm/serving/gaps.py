"""The filled gaps of an answer, and the counts of a request that gives a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_dllm.config.canvas_parts import MASK, CanvasParts
from sglang_dllm.serving.canvas import canvas_of


class GapAnswers:
    """The gaps of the answers of one request, by the ids of SGLang."""

    def __init__(self, manager: Any, obj: Any) -> None:
        """
        Args:
            manager: SGLang's tokenizer manager. Without a tokenizer gaps have no text.
            obj: the GenerateReqInput. Its options are resolved when SGLang gives its
                first output.
        """
        self._manager, self._obj = manager, obj
        self._answers: dict[str, _Answer | None] | None = None

    def add(
        self, response: Mapping[str, Any], final: Sequence[Sequence[Any]] = ()
    ) -> list[dict[str, Any]] | None:
        """Correct the counts of an output, in place, and find its new gaps.

        Args:
            final: index and token ids of gaps that are final, in a stream that may not
                have their text yet.

        Returns:
            The gaps that became final with this output: token ids, text, and the range
            of the answer's positions. None for a request without a canvas.
        """
        if self._answers is None:
            self._answers = self._of_request()
        answer = self._answers.get(response["meta_info"]["id"])
        return None if answer is None else answer.add(response, final)

    def _of_request(self) -> dict[str, _Answer | None]:
        rids, params = self._obj.rid, self._obj.sampling_params
        rids = rids if isinstance(rids, list) else [rids]
        params = params if isinstance(params, list) else [params] * len(rids)
        pairs = zip(rids, params, strict=True)
        return {rid: self._of_answer(one) for rid, one in pairs}

    def _of_answer(self, params: Any) -> _Answer | None:
        parts = canvas_of((params or {}).get("custom_params"))
        if parts is None:
            return None
        manager = self._manager
        # A part of a stream then has its new tokens alone.
        is_delta = self._obj.stream and manager.incremental_streaming_output
        return _Answer(CanvasParts.of(parts), manager.tokenizer, params, is_delta)


class _Answer:
    def __init__(
        self,
        canvas: CanvasParts,
        tokenizer: Any,
        params: Mapping[str, Any],
        is_delta: bool,
    ) -> None:
        self._canvas, self._tokenizer, self._is_delta = canvas, tokenizer, is_delta
        self._decoding = {
            name: params.get(name, True)
            for name in ("skip_special_tokens", "spaces_between_special_tokens")
        }
        self._gaps = dict(enumerate(canvas.gaps))
        self._ids: list[int] = []
        self._text_len = 0

    def add(
        self, response: Mapping[str, Any], final: Sequence[Sequence[Any]]
    ) -> list[dict[str, Any]]:
        meta_info, ids = response["meta_info"], response.get("output_ids") or []
        # SGLang goes on to write to its list.
        self._ids = [*self._ids, *ids] if self._is_delta else list(ids)
        num = meta_info.get("completion_tokens", len(self._ids))
        del self._ids[num:]
        text_len = len(response.get("text") or "")
        self._text_len = self._text_len + text_len if self._is_delta else text_len
        canvas = self._canvas
        meta_info["completion_tokens"] = canvas.num_masks(num)
        if "prompt_tokens" in meta_info:
            meta_info["prompt_tokens"] += canvas.num_given
        has_ended = meta_info.get("finish_reason") is not None
        found = []
        for index, (start, end) in list(self._gaps.items()):
            if end <= num or (has_ended and start <= num):
                del self._gaps[index]
                found.append(self._gap(start, min(end, num), has_ended))
        for index, token_ids in final:
            if index in self._gaps and not has_ended:
                found.append(self._early(*self._gaps.pop(index), token_ids))
        return found

    def _early(self, start: int, end: int, token_ids: Sequence[int]) -> dict[str, Any]:
        """A gap whose text comes later. The given text in front of it is known."""
        found = {"start": start, "end": end, "ids": list(token_ids)}
        if self._tokenizer is not None:
            template = self._canvas.template[:start]
            masks = [at for at, token in enumerate(template) if token == MASK]
            given = list(template[masks[-1] + 1 :])
            before = self._decode(given)
            found["text"] = self._decode([*given, *token_ids])[len(before) :]
        return found

    def _gap(self, start: int, end: int, has_ended: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "start": start,
            "end": end,
            "ids": self._ids[start:end],
        }
        if self._tokenizer is not None:
            before, upto = self._text(start), self._text(end)
            # A stop string may have cut the end off.
            most = self._text_len if has_ended else len(upto)
            found["text"] = upto[len(before) : most]
        return found

    def _text(self, end: int) -> str:
        return self._decode(self._ids[:end])

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), **self._decoding)
        return text
