"""lm-eval's model class for a running server: likelihoods and generation.

    python -m sglang_dllm lm-eval run --model sglang_dllm \\
        --model_args base_url=http://127.0.0.1:30000,method=mc --tasks arc_easy

lm-eval finds classes of other packages only where they are registered before its
command line runs. ``run`` does that. A script may pass an object of ``ServerLM`` to
``lm_eval.simple_evaluate`` instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from typing import Any

import requests
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm
from urllib3.util.retry import Retry

_MAX_ITEMS = 256
"""Continuations of one request. A long context may have more."""


@register_model("sglang_dllm")
class ServerLM(LM):
    """A server of this package, by its routes ``/v1/score`` and ``/generate``."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:30000",
        method: str | None = None,
        num_samples: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        is_greedy: bool = False,
        num_concurrent: int = 8,
        max_retries: int = 8,
        timeout: float = 3600,
        max_gen_toks: int = 256,
        algorithm: str | None = None,
        api_key: str | None = None,
        tokenizer: str | None = None,
        batch_size: Any = None,
        device: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """
        Args:
            method, num_samples, cfg_scale, seed: of ``/v1/score``; the server's own
                where left out.
            is_greedy: ask whether greedy decoding finds each continuation, too. Without
                it the answer is always False. Metrics of accuracy do not read it.
            num_concurrent: requests at once.
            max_retries: tries of a request while the server's queue is full.
            timeout: seconds for one request.
            max_gen_toks: the length of an answer where the task names none.
            algorithm: for generation; the server's own where left out.
            tokenizer: path or name, for tasks under ``--apply_chat_template``.
            batch_size, device, max_batch_size: lm-eval's, without a use here.
        """
        super().__init__()
        self.base_url = str(base_url).rstrip("/").removesuffix("/v1")
        self._score = {
            "method": method,
            "num_samples": num_samples,
            "cfg_scale": None if cfg_scale is None else float(cfg_scale),
            "seed": seed,
            "is_greedy": is_greedy or method == "greedy",
        }
        self._num_concurrent, self._timeout = num_concurrent, timeout
        self._max_gen_toks, self._algorithm = max_gen_toks, algorithm
        self._tokenizer = tokenizer
        self._session = requests.Session()
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"
        retry = Retry(
            max_retries,
            status_forcelist=(503,),
            allowed_methods=None,
            backoff_factor=0.5,
            raise_on_status=False,
        )
        size = max(10, num_concurrent)
        adapter = requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=size)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """``(log-likelihood, whether greedy decoding finds it)`` of each continuation.

        Continuations of one context that follow each other share a request.
        """
        pairs = [request.args for request in requests]
        bodies: list[dict[str, Any]] = []
        for context, group in groupby(pairs, key=lambda pair: pair[0]):
            items = [continuation for _, continuation in group]
            for first in range(0, len(items), _MAX_ITEMS):
                part = items[first : first + _MAX_ITEMS]
                bodies.append({"query": context, "items": part, **self._score})
        found: list[tuple[float, bool]] = []
        for answer in self._ask_all("/v1/score", bodies, "Scoring"):
            greedy = answer.get("is_greedy") or [False] * len(answer["num_forwards"])
            sums = answer.get("scores") or [0.0] * len(greedy)
            found += [
                (float("-inf") if total is None else total, is_greedy)
                for total, is_greedy in zip(sums, greedy, strict=True)
            ]
        for pair, one in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, one)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError(
            "loglikelihood_rolling: no published rule says how a diffusion model "
            "scores a text without a context; expected a task with loglikelihood or "
            "generate_until"
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers up to the first stop string."""
        bodies = [self._generation(*request.args) for request in requests]
        answers = self._ask_all("/generate", bodies, "Generating")
        texts = [answer["text"] for answer in answers]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, context: str, given: dict[str, Any]) -> dict[str, Any]:
        keys = dict(given)
        until = keys.pop("until", [])
        stop = [until] if isinstance(until, str) else list(until)
        does_sample = keys.pop("do_sample", None)
        params = {
            "max_new_tokens": keys.pop("max_gen_toks", self._max_gen_toks),
            "temperature": float(keys.pop("temperature", 0.0)),
            "stop": [one for one in stop if one] or None,
            **keys,
        }
        if does_sample is False:
            params["temperature"] = 0.0
        if self._algorithm is not None:
            params.setdefault("custom_params", {"dllm": {"algorithm": self._algorithm}})
        return {"text": context, "sampling_params": params}

    def _ask_all(
        self, route: str, bodies: Sequence[dict[str, Any]], words: str
    ) -> list[Any]:
        def ask(body: dict[str, Any]) -> Any:
            answer = self._session.post(
                self.base_url + route, json=body, timeout=self._timeout
            )
            if not answer.ok:
                raise RuntimeError(f"{route}: {answer.status_code} {answer.text}")
            return answer.json()

        with ThreadPoolExecutor(self._num_concurrent) as pool:
            return list(tqdm(pool.map(ask, bodies), total=len(bodies), desc=words))

    @cached_property
    def _chat_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ValueError("--apply_chat_template needs tokenizer= in --model_args")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._chat_tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        render: Callable[..., Any] = self._chat_tokenizer.apply_chat_template
        return str(
            render(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


def run(argv: Sequence[str]) -> int:
    """lm-eval's command line, which knows ``--model sglang_dllm`` then."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[:] = ["lm-eval", *argv]
    cli_evaluate()
    return 0
