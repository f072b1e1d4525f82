"""Nothing of a checkpoint runs: no pickle, no Python file, no unbound template."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from sglang.srt.model_loader.weight_utils import pt_weights_iterator
from torch import nn
from transformers import AutoTokenizer

from helpers.changed_checkpoints import change_config
from helpers.launch_probe import run
from helpers.tiny_checkpoints import write_llada
from helpers.tiny_llama_checkpoints import DIFFULLAMA_FLAGS, write_diffullama
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.stored_dtype import stored_dtype
from sglang_dllm.models.tokenizers import plain_tokenizer_path
from sglang_dllm.models.weights import load_tensors


class Evil:
    """A value whose pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


def in_zip(file: Path, marker: Path) -> None:
    torch.save({"weight": torch.eye(2), "more": Evil(marker)}, file)


def in_stream(file: Path, marker: Path) -> None:
    """The form of torch before 1.6."""
    found = {"weight": torch.eye(2), "more": Evil(marker)}
    torch.save(found, file, _use_new_zipfile_serialization=False)


def plain(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Evil(marker)))


def in_tar(file: Path, marker: Path) -> None:
    """The oldest form of torch. SGLang 0.5.17 reads it without a bound."""
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Evil(marker))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


FORMS: list[Callable[[Path, Path], None]] = [in_zip, in_stream, plain, in_tar]


@pytest.mark.parametrize("write", FORMS)
def test_a_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    file, marker = tmp_path / "pytorch_model.bin", tmp_path / "it ran"
    write(file, marker)
    weights = pt_weights_iterator([str(file)])
    with pytest.raises(ConfigError, match="the weights cannot be read"):
        load_tensors(nn.Linear(2, 2, bias=False), weights, lambda name: name)
    assert not marker.exists()


def test_a_file_of_tensors_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": 3 * torch.eye(2)}, file)
    module = nn.Linear(2, 2, bias=False)
    load_tensors(module, pt_weights_iterator([str(file)]), lambda name: name)
    assert torch.equal(module.weight, 3 * torch.eye(2))


@pytest.mark.parametrize("write", FORMS)
def test_the_dtype_is_read_without_running_a_pickle(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    marker = tmp_path / "it ran"
    write(tmp_path / "pytorch_model.bin", marker)
    stored_dtype(str(tmp_path))
    assert not marker.exists()


TRUSTING = ("--dllm-algorithm", "FullAttnMultiBlock", "--trust-remote-code")
EVIL_FILE = "from pathlib import Path\n(Path(__file__).parent / 'it ran').touch()\n"


def with_python_files(folder: Path) -> Path:
    """The checkpoint names a Python file of its own for whatever transformers loads."""
    maps = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", None],
        "AutoProcessor": "evil.EvilProcessor",
    }
    change_config(folder, {"auto_map": maps})
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": maps}))
    for name in ("evil", "configuration_llada", "modeling_llada", "tokenization_llada"):
        (folder / f"{name}.py").write_text(EVIL_FILE)
    return folder


@pytest.mark.parametrize("form", ["a list", "a mapping"])
def test_a_tokenizer_that_is_code_is_refused(tmp_path: Path, form: str) -> None:
    folder = with_python_files(write_llada(tmp_path / "llada", seed=1))
    plain_tokenizer_path(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "EvilTokenizer"}
    if form == "a list":
        config["auto_map"] = config["auto_map"]["AutoTokenizer"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="EvilTokenizer is code of the checkpoint"):
        plain_tokenizer_path(str(folder))
    assert not (folder / "it ran").exists()


@pytest.mark.slow
def test_a_launch_runs_no_python_file_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --trust-remote-code too, which transformers would obey for a Llama."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    llada = with_python_files(write_llada(tmp_path / "llada", seed=1))
    llama = with_python_files(write_diffullama(tmp_path / "diffullama"))
    arguments = [
        ["launch", "--model-path", str(folder), *flags, *TRUSTING]
        for folder, flags in ((llada, []), (llama, DIFFULLAMA_FLAGS))
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = run([{"arguments": one, "plugins": None} for one in arguments], offline)
    for one in found:
        assert one["error"] is None, one["stderr"][-3000:]
        assert one["flags"]["trust_remote_code"] is False
    assert not list(tmp_path.rglob("it ran"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ messages.append('a') }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(write_llada(tmp_path, seed=1))
    tokenizer.chat_template = template
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
