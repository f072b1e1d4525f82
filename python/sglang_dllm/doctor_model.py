"""``python -m sglang_dllm doctor --model PATH``: would this checkpoint load here?

The checks of a launch are asked without a launch. Nothing is loaded: sizes come from
config.json and from the headers of the files. No GPU is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import psutil
import torch

from sglang_dllm.config.checkpoint import explain_unknown_model, refused_model
from sglang_dllm.config.checkpoint_files import check_folder, check_weights
from sglang_dllm.config.dtype import settle_dtype
from sglang_dllm.config.launch_flags import (
    ATTENTION_BACKENDS,
    DEFAULT_MAX_RUNNING_REQUESTS,
)
from sglang_dllm.config.mask_id import mask_id_in
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.config_check import check_config, with_defaults
from sglang_dllm.models.config_fields import TABLES
from sglang_dllm.models.configs import register_configs
from sglang_dllm.models.facts import FAMILIES, ModelFacts, architecture_in
from sglang_dllm.models.tokenizers import tokenizer_of
from sglang_dllm.platform.cpu import STATIC_FRACTION
from sglang_dllm.runtime.graph_memory import (
    EAGER_BYTES,
    ModelSize,
    declared,
    estimate_graph_memory,
)

_ALGORITHM = "FullAttnMultiBlock"
_GIB = 2**30


@dataclass
class Check:
    """One line of the report.

    Attributes:
        is_good: None where the line tells something and refuses nothing.
        numbers: for ``--json``; sizes in bytes, lengths in tokens.
    """

    name: str
    is_good: bool | None
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


def report_checkpoint(args: argparse.Namespace, out: TextIO) -> int:
    """Print one line for each check, or JSON. Returns 0, or 1 if it would not load.

    Args:
        args: the flags of ``doctor``. A flag that was not given is None.
    """
    logging.disable(logging.WARNING)
    try:
        # Libraries print about themselves, and --json promises JSON alone.
        with contextlib.redirect_stdout(io.StringIO()):
            checks = _Examination(args).run()
    finally:
        logging.disable(logging.NOTSET)
    loads = all(check.is_good is not False for check in checks)
    if args.json:
        found = [
            {"name": c.name, "ok": c.is_good, "text": c.text, **c.numbers}
            for c in checks
        ]
        print(json.dumps({"loads": loads, "checks": found}, indent=1), file=out)
        return 0 if loads else 1
    for check in checks:
        mark = {True: "ok", False: "no", None: "-"}[check.is_good]
        print(f"{mark:<4}{check.name:<14}{check.text}", file=out)
    print(f"{'':<4}{'':<14}{'would load' if loads else 'would not load'}", file=out)
    return 0 if loads else 1


class _Examination:
    """The checks of one checkpoint, in the order of a launch.

    A check that needs an earlier one is left out where that one has failed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        has_gpu = torch.cuda.is_available()
        device = args.device or ("cuda" if has_gpu else "cpu")
        self._args = args
        self._folder = Path(args.model)
        self._fields: dict[str, Any] = {}
        self._architecture = ""
        self._flags = SimpleNamespace(
            model_path=args.model,
            tokenizer_path=None,
            revision=None,
            device=device,
            dtype=args.dtype,
            attention_backend=args.attention_backend
            or ("flashinfer" if device == "cuda" else "torch_native"),
            json_model_override_args=args.json_model_override_args,
            max_running_requests=args.max_running_requests
            or DEFAULT_MAX_RUNNING_REQUESTS,
            disable_decode_cuda_graph=False,
            cuda_graph_bs_decode=None,
            cuda_graph_max_bs_decode=None,
            tp_size=1,
            dllm_algorithm=_ALGORITHM,
            dllm_algorithm_config=None,
        )

    def run(self) -> list[Check]:
        found = [
            self._asked("folder", self._check_folder),
            self._asked("weights", self._check_weights),
        ]
        if found[0].is_good:
            for name, check in (
                ("model", self._check_architecture),
                ("config", self._check_config),
                ("tokenizer", self._check_tokenizer),
                ("dtype", self._check_dtype),
                ("attention", self._check_attention),
                ("context", self._check_context),
            ):
                found.append(self._asked(name, check))
                if name in ("model", "config") and not found[-1].is_good:
                    return found
        if all(check.is_good is not False for check in found):
            found += self._memory()
        return found

    @staticmethod
    def _asked(name: str, check: Callable[[], str]) -> Check:
        try:
            return Check(name, True, check())
        except ConfigError as error:
            return Check(name, False, str(error))

    def _check_folder(self) -> str:
        if not self._folder.is_dir():
            raise ConfigError(f"{self._folder}: there is no such folder")
        check_folder(str(self._folder))
        text = (self._folder / "config.json").read_text(encoding="utf-8")
        try:
            overrides = json.loads(self._flags.json_model_override_args)
        except ValueError as error:
            raise ConfigError(f"--json-model-override-args: {error}") from None
        if not isinstance(overrides, dict):
            raise ConfigError("--json-model-override-args: expected a JSON object")
        self._fields = {**json.loads(text), **overrides}
        return str(self._folder)

    def _check_weights(self) -> str:
        check_weights(str(self._folder), "auto")
        return "each file of the index is there, and whole"

    def _check_architecture(self) -> str:
        architecture = architecture_in(self._fields)
        if architecture is None:
            explain_unknown_model(str(self._folder))
        if architecture not in FAMILIES:
            raise refused_model(_ALGORITHM, architecture)
        self._architecture = architecture
        return architecture

    def _check_config(self) -> str:
        check_config(self._fields, self._architecture)
        method = (self._fields.get("quantization_config") or {}).get("quant_method")
        return f"quantized: {method}" if method else "each field is read or harmless"

    def _check_tokenizer(self) -> str:
        tokenizer = tokenizer_of(None, self._flags)
        if tokenizer is None:
            raise ConfigError(f"{self._folder}: no tokenizer that can be read")
        mask_id = self._fields.get("mask_token_id")
        if mask_id is None:
            mask_id = mask_id_in(tokenizer, FAMILIES[self._architecture])
        known = with_defaults(self._fields, self._architecture)
        facts = ModelFacts.from_hf_config(
            SimpleNamespace(
                architectures=[self._architecture],
                mask_token_id=mask_id,
                eos_token_id=self._fields.get("eos_token_id"),
                vocab_size=known.get("embedding_size") or known["vocab_size"],
            )
        )
        differences = facts.differences_from(tokenizer)
        return "; ".join(
            [f"mask {facts.mask_id}, EOS {', '.join(map(str, facts.eos_ids))}"]
            + [f"warning: {one}" for one in differences]
        )

    def _check_dtype(self) -> str:
        settle_dtype(self._flags)
        if self._flags.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError(
                f"--dtype={self._flags.dtype!r}; expected auto, bfloat16, float16 or "
                "float32"
            )
        return f"{self._flags.dtype} on {self._flags.device}"

    def _check_attention(self) -> str:
        name = self._flags.attention_backend
        if name not in ATTENTION_BACKENDS:
            raise ConfigError(
                f"--attention-backend={name!r}; expected one of "
                f"{', '.join(ATTENTION_BACKENDS)}"
            )
        if self._flags.device == "cpu" and name != "torch_native":
            raise ConfigError(f"--attention-backend={name!r} needs a GPU")
        return str(name)

    def _check_context(self) -> str:
        known = with_defaults(self._fields, self._architecture)
        most = known[TABLES[self._architecture].positions]
        asked = self._args.context_length or most
        if not 1 <= asked <= most:
            raise ConfigError(f"--context-length={asked}; expected 1 to {most}")
        self._context = int(asked)
        return f"{asked} of {most} tokens"

    def _memory(self) -> list[Check]:
        """The lines of weights, KV pool and graphs, and whether they fit."""
        known = with_defaults(self._fields, self._architecture)
        table = TABLES[self._architecture]
        dtype = getattr(torch, self._flags.dtype)
        weights = _weight_bytes(self._folder, dtype.itemsize)
        head_dim = known.get("head_dim") or known[table.hidden] // known[table.heads]
        token = 2 * known[table.layers] * known[table.kv_heads] * head_dim
        token *= dtype.itemsize
        canvas = token * self._context
        most = self._flags.max_running_requests
        graphs, eager = self._graphs(dtype)
        checks = [
            Check("memory", None, f"weights {_gib(weights)}", {"weights": weights}),
            Check(
                "kv pool",
                None,
                f"{token / 1024:.1f} KiB a token, {_gib(canvas)} a canvas of "
                f"{self._context}, {_gib(canvas * most)} for {most} of them",
                {"bytes_per_token": token, "bytes_per_canvas": canvas},
            ),
            Check("graphs", None, f"{_gib(graphs)}, estimated", {"graphs": graphs}),
        ]
        budget, source = self._budget(graphs + eager)
        if budget is None:
            text = "not known here; give --device-memory"
            return [*checks, Check("device", None, text)]
        free = budget - weights
        numbers = {"budget": int(budget), "tokens": max(0, int(free // token))}
        if free < canvas:
            text = (
                f"{_gib(budget)} ({source}) do not hold the weights and one canvas of "
                f"{self._context} tokens, {_gib(weights + canvas)}"
            )
            return [*checks, Check("device", False, text, numbers)]
        text = (
            f"{_gib(budget)} ({source}) leave room for {numbers['tokens']} tokens: "
            f"{free / canvas:.1f} canvases of {self._context}"
        )
        return [*checks, Check("device", True, text, numbers)]

    def _graphs(self, dtype: torch.dtype) -> tuple[int, int]:
        """Estimated bytes of the graphs, and of the largest eager forward."""
        from transformers import AutoConfig

        register_configs()
        config = AutoConfig.from_pretrained(self._folder)
        config.update(self._fields)
        config.architectures = [self._architecture]
        known = SimpleNamespace(
            hf_config=config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context_len=self._context,
            dtype=dtype,
        )
        size = ModelSize.of_model_config(known)
        forwards, steps = declared(self._flags, known)
        graphs = estimate_graph_memory(
            size, forwards, steps, self._context, self._flags.attention_backend
        )
        eager = EAGER_BYTES if self._flags.device == "cuda" else 0
        return graphs.total, eager

    def _budget(self, rest: int) -> tuple[float | None, str]:
        """Bytes for weights and KV pool, and how they are found."""
        given = self._args.device_memory
        if self._flags.device == "cpu":
            free = given * _GIB if given else psutil.virtual_memory().available
            share = STATIC_FRACTION
            return share * free, f"{share} of the free {_gib(free)}"
        if given is None and not torch.cuda.is_available():
            return None, ""
        whole = (
            given * _GIB if given else torch.cuda.get_device_properties(0).total_memory
        )
        return whole - rest, f"{_gib(whole)} without graphs and work space"


def _weight_bytes(folder: Path, itemsize: int) -> int:
    """The bytes of a folder's tensors once they are loaded.

    Args:
        itemsize: of the dtype in which floating numbers are served. Other tensors, of
            quantized layers, keep theirs.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        kinds = ("*.bin", "*.pt", "*.gguf")
        return sum(f.stat().st_size for kind in kinds for f in folder.glob(kind))
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                part = tensors.get_slice(name)
                kind = part.get_dtype()
                is_plain = kind in ("F64", "F32", "F16", "BF16")
                size = itemsize if is_plain else _STORED[kind]
                total += math.prod(part.get_shape()) * size
    return total


_STORED = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_STORED |= {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
