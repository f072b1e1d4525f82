"""A launch with a wrong checkpoint ends with one line, before any other process.

SGLang's own resolution of its flags runs, with the package installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.changed_checkpoints import change_config
from helpers.launch_probe import run
from helpers.tiny_a2d_checkpoints import (
    ILLADA_TOKENS,
    QWEN_TOKENS,
    write_a2d_qwen3,
    write_illada,
)
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import DIFFULLAMA_FLAGS, write_diffullama

pytestmark = pytest.mark.slow

ALGORITHM = ("--dllm-algorithm", "FullAttnMultiBlock")


def without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def with_fields(**fields: Any) -> Callable[[Path], object]:
    return lambda path: change_config(path, fields)


def without_mask(path: Path) -> None:
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("<[MASK]>", "<[GAP]>"))


WRONG: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], str]] = {
    # Transformers would raise a KeyError for these two.
    "scaling": (
        write_dream,
        with_fields(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling.low_freq_factor is missing",
    ),
    "llama-scaling": (
        write_diffullama,
        with_fields(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling.low_freq_factor is missing",
    ),
    "field": (write_llada, with_fields(clip_qkv=1.0), "clip_qkv=1.0"),
    "no-config": (write_llada, without("config.json"), "has no config.json"),
    "no-weights": (write_llada, without("model.safetensors"), "no weights"),
    "no-tokenizer": (write_llada, without("tokenizer.json"), "there is no tokenizer"),
    "quantization": (
        write_llada,
        with_fields(quantization_config={"quant_method": "foo"}),
        "Unknown quantization method: foo",
    ),
    "no-mask": (write_illada, without_mask, "mask_token_id=None"),
    "model-type": (write_dream, with_fields(model_type="odream"), "model_type="),
}
OTHERS = {
    # Without the override, a DiffuLLaMA is an autoregressive Llama.
    "another-model": "--dllm-algorithm='FullAttnMultiBlock' does not decode Llama",
    "no-repository": "--model-path='nope/x', which is no folder here: ",
}
PREFERRED = "preferred"
GOOD = "good"
MASKS = {
    "illada": (write_illada, ILLADA_TOKENS["<[MASK]>"]),
    "a2d": (write_a2d_qwen3, QWEN_TOKENS["<|mask|>"]),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("wrong")
    asked = {}
    for name, (write, change, _) in WRONG.items():
        path = write(root / name)
        change(path)
        flags = DIFFULLAMA_FLAGS if write is write_diffullama else ()
        asked[name] = (path, flags)
    good = write_dream(root / "good")
    (root / "link").symlink_to(good)
    given = json.dumps({"repetition_penalty": 1.05})
    asked[PREFERRED] = (good, ("--preferred-sampling-params", given))
    asked[GOOD] = (f"{root}/link/", ())
    asked |= {name: (write(root / name), ()) for name, (write, _) in MASKS.items()}
    asked["another-model"] = (write_diffullama(root / "llama"), ())
    asked["no-repository"] = ("nope/x", ())
    arguments = [
        ["launch", "--model-path", str(path), "--device", "cpu", *ALGORITHM, *flags]
        for path, flags in asked.values()
    ]
    launched = ({"arguments": each, "plugins": None} for each in arguments)
    # No hub is asked for the folder that is not there.
    found = run(launched, {"HF_HUB_OFFLINE": "1"})
    return dict(zip(asked, found, strict=True))


@pytest.mark.parametrize("name", [*WRONG, *OTHERS, PREFERRED])
def test_one_line_and_status_2(name: str, launches: dict[str, dict[str, Any]]) -> None:
    found = launches[name]
    reason = OTHERS.get(name, "repetition_penalty=1.05")
    reason = WRONG[name][2] if name in WRONG else reason
    assert found["error"] == "SystemExit: 2"
    *_, line = found["stderr"].strip().splitlines()
    assert line.startswith("sglang-dllm: error: ")
    assert reason in line
    assert "Traceback" not in found["stderr"]


def test_a_link_with_a_trailing_slash_is_served(
    launches: dict[str, dict[str, Any]],
) -> None:
    assert launches[GOOD]["error"] is None


def test_a_cpu_takes_most_of_its_memory_and_a_pool_of_64_long_canvases(
    launches: dict[str, dict[str, Any]],
) -> None:
    flags = launches[GOOD]["flags"]
    assert flags["mem_fraction_static"] == 0.8
    assert flags["max_total_tokens"] == 64 * 512


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_config_json_lacks_is_found(
    name: str, launches: dict[str, dict[str, Any]]
) -> None:
    found = launches[name]
    assert found["error"] is None, found["stderr"][-2000:]
    overrides = json.loads(found["flags"]["json_model_override_args"])
    assert overrides == {"mask_token_id": MASKS[name][1]}
