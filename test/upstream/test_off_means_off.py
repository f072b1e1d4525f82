"""A launch that is not ours reads nothing more and runs nothing of ours.

The tests start SGLang's own resolution of its flags in a process of their own, with
the package installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_dllm.demo import demo_path
from sglang_dllm.upstream.launch import architecture_of, is_of_another_plugin

MIB = 2**20


def args_of(**fields: object) -> Any:
    """ServerArgs as the user gave them, before SGLang derives anything."""
    args = object.__new__(ServerArgs)
    for name, field in ServerArgs.__dataclass_fields__.items():
        object.__setattr__(args, name, field.default)
    for name, value in fields.items():
        object.__setattr__(args, name, value)
    return args


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file that is opened, and any config that is asked for, is an error."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"read: {args}")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    monkeypatch.setattr("sglang.srt.utils.hf_transformers_utils.get_config", fail)


@pytest.mark.parametrize("algorithm", [None, "LowConfidence", "FullAttnMultiBlock"])
def test_a_file_is_never_opened(
    algorithm: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = tmp_path / "weights.gguf"
    file.touch()
    request.getfixturevalue("no_reads")
    args = args_of(model_path=str(file), dllm_algorithm=algorithm)
    assert architecture_of(args) is None


def test_no_repository_is_asked_without_an_algorithm(no_reads: None) -> None:
    assert architecture_of(args_of(model_path="nobody/has-this-model")) is None


def test_a_folders_config_is_enough(tmp_path: Path) -> None:
    assert architecture_of(args_of(model_path=str(demo_path()))) == "LLaDAModelLM"
    assert architecture_of(args_of(model_path=str(tmp_path))) is None
    override = '{"architectures": ["DiffuLlamaModel"]}'
    args = args_of(model_path=str(demo_path()), json_model_override_args=override)
    assert architecture_of(args) == "DiffuLlamaModel"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\x00", '{"architectures": 5}', '{"architectures": []}']
)
def test_a_broken_config_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert architecture_of(args_of(model_path=str(tmp_path))) is None


def test_an_algorithm_of_another_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    theirs = type("Theirs", (), {"__module__": "other_plugin.algorithms"})
    monkeypatch.setitem(algo_name_to_cls, "Theirs", theirs)
    assert is_of_another_plugin("Theirs")
    for name in (None, "LowConfidence", "FullAttnMultiBlock", "Nope"):
        assert not is_of_another_plugin(name)


_LAUNCH = """
import json, resource, sys
from sglang.srt.plugins import load_plugins
load_plugins()
import huggingface_hub
import sglang_dllm.config.launch_flags as flags
import sglang_dllm.runtime.dllm_config as config
import sglang.srt.utils.hf_transformers.config as upstream
from sglang.srt.server_args import ServerArgs, prepare_server_args

ours, reads = [], []

def note(module, name):
    original = getattr(module, name)
    def noted(*args, **kwargs):
        ours.append(name)
        return original(*args, **kwargs)
    setattr(module, name, noted)

for module, name in (
    (flags, "settle_launch_flags"),
    (config, "full_attn_config"),
    (config, "hf_config_of"),
):
    note(module, name)

import transformers.utils.hub as hub
original = hub.hf_hub_download
def download(*args, **kwargs):
    reads.append(kwargs.get("filename", args[1:]))
    return original(*args, **kwargs)
hub.hf_hub_download = download

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
error = None
try:
    if sys.argv[1] == "early":
        # Stops behind the step of SGLang's resolution that we have a hook on.
        args = object.__new__(ServerArgs)
        for name, field in ServerArgs.__dataclass_fields__.items():
            object.__setattr__(args, name, field.default)
        args.model_path = sys.argv[2]
        args.dllm_algorithm = sys.argv[3] if len(sys.argv) > 3 else None
        args._handle_missing_default_values()
    else:
        prepare_server_args(sys.argv[2:])
except BaseException as raised:
    error = f"{type(raised).__name__}: {raised}"
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print("\\n" + json.dumps(
    {"ours": ours, "reads": reads, "grown": grown * 1024, "error": error}
))
"""


def launch(*arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "stderr": done.stderr}


def test_a_large_gguf_file_costs_no_memory(tmp_path: Path) -> None:
    """It was read as text: 600 MiB of weights took 1.8 GiB and 2.4 s."""
    file = tmp_path / "weights.gguf"
    with file.open("wb") as out:
        out.truncate(600 * MIB)
    found = launch("early", str(file))
    assert found["error"] is None
    assert found["ours"] == []
    assert found["grown"] < 50 * MIB


def test_a_repository_is_not_asked_for_its_config_by_us() -> None:
    found = launch("early", "nobody/has-this-model")
    assert found == {**found, "ours": [], "reads": [], "error": None}


def cached_repository(cache: Path, **config: Any) -> None:
    """The hub's cache of someone/a-model, which has a config.json only."""
    snapshot = cache / "models--someone--a-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))


def test_a_repository_is_asked_as_often_as_without_us(tmp_path: Path) -> None:
    """Also with an algorithm, when we look at the config too. A cached repository
    stands for the hub: each call would be a request."""
    cached_repository(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama")
    reads = [
        launch(
            *("launch", "--model-path", "someone/a-model", "--device", "cpu"),
            *("--dllm-algorithm", "LowConfidence"),
            env={"SGLANG_PLUGINS": plugins, "HF_HUB_CACHE": str(tmp_path)},
        )["reads"]
        for plugins in ("", "sglang_dllm_cpu")
    ]
    assert reads[0] == reads[1] != []


def test_sglangs_own_diffusion_model_is_sglangs_own(tmp_path: Path) -> None:
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 151_680,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = launch(
        *("launch", "--model-path", str(tmp_path), "--device", "cpu"),
        *("--dllm-algorithm", "LowConfidence"),
    )
    assert found["ours"] == []
    assert found["error"] is None


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "repository"])
def test_a_model_of_ours_needs_an_algorithm(is_folder: bool, tmp_path: Path) -> None:
    config = json.loads((demo_path() / "config.json").read_text())
    cached_repository(tmp_path, **config)
    path = str(demo_path()) if is_folder else "someone/a-model"
    found = launch(
        *("launch", "--model-path", path, "--device", "cpu"),
        env={"HF_HUB_CACHE": str(tmp_path)},
    )
    assert found["error"] == "SystemExit: 2"
    assert "LLaDAModelLM is a diffusion model: add --dllm-algorithm" in found["stderr"]
