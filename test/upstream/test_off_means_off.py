"""A launch that is not ours reads nothing more and runs nothing of ours.

The tests start SGLang's own resolution of its flags in a process of their own, with
the package installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.launch_probe import run
from helpers.upstream_shapes import SDAR, raw_args
from sglang_dllm.demo import demo_path
from sglang_dllm.upstream.launch import architecture_of, is_of_another_plugin

MIB = 2**20


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
    args = raw_args(model_path=str(file), dllm_algorithm=algorithm)
    assert architecture_of(args) is None


def test_no_repository_is_asked_without_an_algorithm(no_reads: None) -> None:
    assert architecture_of(raw_args(model_path="nobody/has-this-model")) is None


def test_a_folders_config_is_enough(tmp_path: Path) -> None:
    assert architecture_of(raw_args(model_path=str(demo_path()))) == "LLaDAModelLM"
    assert architecture_of(raw_args(model_path=str(tmp_path))) is None
    override = '{"architectures": ["DiffuLlamaModel"]}'
    args = raw_args(model_path=str(demo_path()), json_model_override_args=override)
    assert architecture_of(args) == "DiffuLlamaModel"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\x00", '{"architectures": 5}', '{"architectures": []}']
)
def test_a_broken_config_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert architecture_of(raw_args(model_path=str(tmp_path))) is None


def test_an_algorithm_of_another_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    theirs = type("Theirs", (), {"__module__": "other_plugin.algorithms"})
    monkeypatch.setitem(algo_name_to_cls, "Theirs", theirs)
    assert is_of_another_plugin("Theirs")
    for name in (None, "LowConfidence", "FullAttnMultiBlock", "Nope"):
        assert not is_of_another_plugin(name)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def cached_repository(cache: Path, name: str, config: dict[str, Any]) -> None:
    """The hub's cache of someone/NAME, which has a config.json only."""
    snapshot = cache / f"models--someone--{name}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The launches of these tests, all resolved in one process."""
    folder = tmp_path_factory.mktemp("launches")
    gguf, sdar, cache = folder / "weights.gguf", folder / "sdar", folder / "cache"
    with gguf.open("wb") as out:
        out.truncate(600 * MIB)
    sdar.mkdir()
    (sdar / "config.json").write_text(json.dumps(SDAR))
    demo = json.loads((demo_path() / "config.json").read_text())
    cached_repository(cache, "a-llama", LLAMA)
    cached_repository(cache, "a-llada", demo)

    def launch(path: Path | str, *flags: str) -> list[str]:
        return ["launch", "--model-path", str(path), "--device", "cpu", *flags]

    theirs = ("--dllm-algorithm", "LowConfidence")
    asked: dict[str, tuple[list[str], str | None]] = {
        "gguf": (["early", str(gguf)], None),
        "repository": (["early", "nobody/has-this-model"], None),
        "llama without us": (launch("someone/a-llama", *theirs), ""),
        "llama with us": (launch("someone/a-llama", *theirs), "sglang_dllm_cpu"),
        "sdar": (launch(sdar, *theirs), None),
        "ours in a folder": (launch(demo_path()), None),
        "ours in a repository": (launch("someone/a-llada"), None),
    }
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    found = run(({"arguments": a, "plugins": p} for a, p in asked.values()), hub)
    return dict(zip(asked, found, strict=True))


Launches = dict[str, dict[str, Any]]


@pytest.mark.slow
def test_a_large_gguf_file_costs_no_memory(launches: Launches) -> None:
    """It was read as text: 600 MiB of weights took 1.8 GiB and 2.4 s."""
    found = launches["gguf"]
    assert found["error"] is None
    assert found["ours"] == []
    assert found["grown"] < 50 * MIB


@pytest.mark.slow
def test_a_repository_is_not_asked_for_its_config_by_us(launches: Launches) -> None:
    found = launches["repository"]
    assert found == {**found, "ours": [], "reads": [], "error": None}


@pytest.mark.slow
def test_a_repository_is_asked_as_often_as_without_us(launches: Launches) -> None:
    """Also with an algorithm, when we look at the config too.

    A cached repository stands for the hub: each call would be a request.
    """
    with_us, without = (launches[f"llama {how} us"] for how in ("with", "without"))
    assert with_us["reads"] == without["reads"] != []


@pytest.mark.slow
def test_sglangs_own_diffusion_model_is_sglangs_own(launches: Launches) -> None:
    found = launches["sdar"]
    assert found["ours"] == []
    assert found["error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "repository"])
def test_a_model_of_ours_needs_an_algorithm(place: str, launches: Launches) -> None:
    found = launches[f"ours in a {place}"]
    assert found["error"] == "SystemExit: 2"
    assert "LLaDAModelLM is a diffusion model: add --dllm-algorithm" in found["stderr"]
