"""Requests to a server: by our native route, or by the OpenAI protocol."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import requests

from benchmark.command import BenchmarkError
from benchmark.gsm8k.problems import Messages

BUSY = (429, 503)
BUSY_WAITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sampling:
    """The parameters of a request beside its prompt."""

    max_new_tokens: int = 256
    temperature: float = 0
    seed: int | None = None
    ignore_eos: bool = False
    stops: tuple[str, ...] = ()
    dllm: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """An answer. A field is None if the server does not tell it."""

    text: str
    tokens: int
    ids: list[int] | None = None
    forwards: int | None = None
    canvas_len: int | None = None
    dllm: dict[str, Any] | None = None


def _fields(sampling: Sampling) -> dict[str, Any]:
    """The fields that both protocols name alike, without those at their default."""
    fields: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    if sampling.stops:
        fields["stop"] = list(sampling.stops)
    if sampling.dllm:
        fields["custom_params"] = {"dllm": sampling.dllm}
    return fields


class Client:
    """One server. ``api`` is "native" or "openai", never "auto"."""

    def __init__(
        self,
        base_url: str,
        api: str = "auto",
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        timeout: float = 600,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._local = threading.local()
        served: dict[str, Any] = {}
        info = self._info() if api != "openai" else None
        if api == "native" and info is None:
            raise BenchmarkError(
                f"{self.base_url} has no /model_info: use --api openai"
            )
        self.api = "openai" if info is None else "native"
        if info is None:
            self.model = model or self._served_model()
            path = tokenizer
        else:
            self.model = model or info["model_path"]
            path = tokenizer or info.get("tokenizer_path")
            served = self._json("/server_info") or {}
        # The store keeps answers under this key. Without the server's own values, a
        # rerun would take another server's answers for this one's.
        self.identity = [self.base_url, self.api, self.model] + [
            served.get(name) for name in ("dllm_algorithm", "dllm_algorithm_config")
        ]
        # The server may run on another machine, and its tokenizer's folder with it.
        # Only a chat prompt on the native route needs the tokenizer here.
        self._tokenizer_path = path
        self.tokenizer = _load_tokenizer(path, required=tokenizer is not None)

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            key = os.environ.get("OPENAI_API_KEY")
            if key:
                self._local.session.headers["Authorization"] = f"Bearer {key}"
        session: requests.Session = self._local.session
        return session

    def _get(self, path: str) -> requests.Response:
        try:
            return self._session().get(self.base_url + path, timeout=30)
        except requests.ConnectionError:
            raise BenchmarkError(f"no server at {self.base_url}") from None
        except requests.RequestException as error:
            raise BenchmarkError(
                f"{self.base_url}{path}: {_first_line(error)}"
            ) from None

    def _json(self, path: str) -> dict[str, Any] | None:
        response = self._get(path)
        try:
            body = response.json() if response.ok else None
        except ValueError:
            return None
        return body if isinstance(body, dict) else None

    def _info(self) -> dict[str, Any] | None:
        info = self._json("/model_info")
        return info if info and "model_path" in info else None

    def _served_model(self) -> str:
        response = self._get("/v1/models")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise BenchmarkError(
                f"{self.base_url}/v1/models names no model: give --model"
            ) from None

    def render(self, messages: Messages) -> str:
        """The text of a chat for the native route, without the BOS that it adds."""
        if self.tokenizer is None:
            raise BenchmarkError(
                f"no tokenizer {self._tokenizer_path} here, and a chat prompt on the "
                "native route needs it: give --tokenizer DIR or --api openai"
            )
        text = str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos and self.tokenizer("").input_ids else text

    def ask(self, prompt: str | Messages, sampling: Sampling) -> Reply:
        if self.api == "native":
            return self._ask_native(prompt, sampling)
        return self._ask_openai(prompt, sampling)

    def _ask_native(self, prompt: str | Messages, sampling: Sampling) -> Reply:
        params = {"max_new_tokens": sampling.max_new_tokens, **_fields(sampling)}
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed
        text = prompt if isinstance(prompt, str) else self.render(prompt)
        answer = self._post("/generate", {"text": text, "sampling_params": params})
        try:
            meta = answer["meta_info"]
            return Reply(
                text=answer["text"],
                tokens=meta["completion_tokens"],
                ids=answer.get("output_ids"),
                forwards=meta.get("num_forwards"),
                canvas_len=meta.get("canvas_len"),
                dllm=meta.get("dllm"),
            )
        except (KeyError, TypeError) as error:
            raise BenchmarkError(f"/generate answered without {error}") from None

    def _ask_openai(self, prompt: str | Messages, sampling: Sampling) -> Reply:
        limit = {"model": self.model, "max_tokens": sampling.max_new_tokens}
        body = {**limit, **_fields(sampling)}
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        chat = not isinstance(prompt, str)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        answer = self._post(path, {**body, "messages" if chat else "prompt": prompt})
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            tokens = answer["usage"]["completion_tokens"]
        except (KeyError, IndexError, TypeError) as error:
            raise BenchmarkError(f"{path} answered without {error}") from None
        return Reply(text=text or "", tokens=tokens)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for wait in (*BUSY_WAITS, None):
            try:
                response = self._session().post(
                    self.base_url + path, json=body, timeout=self.timeout
                )
            except requests.RequestException as error:
                raise BenchmarkError(f"{path}: {_first_line(error)}") from None
            if response.status_code not in BUSY or wait is None:
                break
            time.sleep(wait)
        if not response.ok:
            raise BenchmarkError(
                f"{path} answered {response.status_code}: {_message(response)}"
            )
        try:
            answer: dict[str, Any] = response.json()
        except ValueError:
            raise BenchmarkError(f"{path} did not answer with JSON") from None
        return answer


def _load_tokenizer(path: str | None, *, required: bool) -> Any:
    """The tokenizer, or None if it does not load and nobody named it."""
    if path is None:
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises errors of any class
        if required:
            raise BenchmarkError(
                f"cannot load the tokenizer {path}: {_first_line(error)}"
            ) from None
        return None


def _message(response: requests.Response) -> str:
    """The text of an error response in one line, whatever its shape."""
    try:
        body = response.json()
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
