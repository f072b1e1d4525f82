"""``--dtype auto``: the checkpoint's own dtype, on a GPU and on a CPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_a2d_checkpoints import write_a2d_qwen3, write_illada
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import write_diffullama, write_llada_moe
from helpers.upstream_shapes import raw_args, settled
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.stored_dtype import stored_dtype

WRITERS = {
    "LLaDAModelLM": write_llada,
    "DreamModel": write_dream,
    "LLaDAMoEModelLM": write_llada_moe,
    "DiffuLlamaModel": write_diffullama,
    "ILLaDAForCausalLM": write_illada,
    "A2DQwen3LMHeadModel": write_a2d_qwen3,
}
ALL = dict.fromkeys(("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"), True)


def settings_of(path: Path, device: str, architecture: str, **flags: object) -> Any:
    """The settled flags of a launch."""
    flags.setdefault("dllm_algorithm", "FullAttnMultiBlock")
    args = raw_args(model_path=str(path), device=device, **flags)
    return settled(args, architecture)


def dtype_of(
    path: Path,
    device: str = "cuda",
    architecture: str = "LLaDAModelLM",
    **flags: object,
) -> str:
    return str(settings_of(path, device, architecture, **flags).dtype)


def edit(path: Path, *dropped: str, **fields: object) -> Path:
    """Change config.json."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name in dropped:
        config.pop(name, None)
    file.write_text(json.dumps(config | fields))
    return path


def without_dtype(path: Path) -> Path:
    return edit(path, "torch_dtype", "dtype")


@pytest.fixture(autouse=True)
def a_processor_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, **ALL)


def has(monkeypatch: pytest.MonkeyPatch, **features: bool) -> None:
    """Make this machine an x86-64 processor with some features."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", WRITERS)
def test_a_config_without_a_dtype_takes_the_tensors(
    architecture: str, dtype: str, device: str, tmp_path: Path
) -> None:
    stored = getattr(torch, dtype)
    path = without_dtype(WRITERS[architecture](tmp_path / "tiny", dtype=stored))
    assert dtype_of(path, device, architecture) == dtype


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "torch.bfloat16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
        {"text_config": {"torch_dtype": "bfloat16"}},
    ],
)
def test_the_config_counts_before_the_tensors(
    fields: dict[str, object], tmp_path: Path
) -> None:
    path = edit(without_dtype(write_llada(tmp_path)), **fields)
    assert dtype_of(path) == "bfloat16"


@pytest.mark.parametrize("name", ["auto", "float8_e4m3fn", "", None])
def test_a_name_that_is_no_dtype_says_nothing(name: object, tmp_path: Path) -> None:
    path = edit(write_llada(tmp_path, dtype=torch.bfloat16), torch_dtype=name)
    assert dtype_of(path) == "bfloat16"


def test_the_users_choice_stays(tmp_path: Path) -> None:
    path = write_llada(tmp_path, dtype=torch.bfloat16)
    for dtype in ("float16", "half", "float32"):
        assert dtype_of(path, dtype=dtype) == dtype
        assert dtype_of(path, "cpu", dtype=dtype) == dtype
    override = '{"torch_dtype": "float16"}'
    assert dtype_of(path, json_model_override_args=override) == "float16"


def test_float32_is_float32_and_attention_follows(tmp_path: Path) -> None:
    """SGLang would take float16. FlashInfer has no float32."""
    plain = settings_of(write_llada(tmp_path / "f32"), "cuda", "LLaDAModelLM")
    assert (plain.dtype, plain.attention_backend) == ("float32", "triton")
    path = write_llada(tmp_path / "bf16", dtype=torch.bfloat16)
    half = settings_of(path, "cuda", "LLaDAModelLM")
    assert (half.dtype, half.attention_backend) == ("bfloat16", "flashinfer")


@pytest.mark.parametrize(
    ("features", "bf16", "fp16"),
    [
        (("avx512_bf16",), "bfloat16", "float32"),
        (("amx_bf16",), "bfloat16", "float32"),
        (("avx512_fp16",), "float32", "float16"),
        (("amx_fp16",), "float32", "float16"),
        # AVX-512 alone: oneDNN calls bfloat16 supported, and emulates it.
        (("avx512_f", "avx512_bw"), "float32", "float32"),
        ((), "float32", "float32"),
    ],
)
def test_a_processor_keeps_what_it_multiplies(
    features: tuple[str, ...],
    bf16: str,
    fp16: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    has(monkeypatch, **dict.fromkeys(features, True))
    for stored, wanted in ((torch.bfloat16, bf16), (torch.float16, fp16)):
        path = write_llada(tmp_path / str(stored), dtype=stored)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert dtype_of(path, "cpu") == wanted
        (line,) = [m for m in caplog.messages if m.startswith("dtype ")]
        assert line.startswith(f"dtype {wanted}, ")
        assert ("does not multiply" in line) == (wanted == "float32")
        assert dtype_of(path, "cuda") == str(stored).removeprefix("torch.")


def test_other_processors_ask_onednn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    path = write_llada(tmp_path, dtype=torch.bfloat16)
    for answer, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda a=answer: a
        )
        assert dtype_of(path, "cpu") == dtype


def test_a_checkpoint_of_pickles(tmp_path: Path) -> None:
    path = without_dtype(write_llada(tmp_path, dtype=torch.bfloat16))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "training_args.bin").write_bytes(b"no tensors")
    assert dtype_of(path) == "bfloat16"


def test_most_bytes_decide(tmp_path: Path) -> None:
    """Norms and routers are float32 in many checkpoints, in more tensors than all."""
    save_file(
        {
            "norm": torch.ones(8),
            "bias": torch.ones(8),
            "weight": torch.ones(64, 8, dtype=torch.bfloat16),
            "quantized": torch.ones(4096, dtype=torch.int32),
        },
        tmp_path / "model-00001-of-00001.safetensors",
    )
    assert stored_dtype(str(tmp_path)) is torch.bfloat16


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 64]
)
def test_no_dtype_at_all_asks_for_the_flag(content: bytes, tmp_path: Path) -> None:
    path = without_dtype(write_llada(tmp_path))
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"names no dtype.*add --dtype") as error:
        dtype_of(path)
    assert "\n" not in str(error.value)
    assert dtype_of(path, dtype="bfloat16") == "bfloat16"


def test_flashinfer_by_name_gets_bfloat16(tmp_path: Path) -> None:
    """d3LLM's launch lines are accepted as they stand, for a float32 checkpoint too."""
    path = write_llada(tmp_path / "model")
    found = settings_of(path, "cuda", "LLaDAModelLM", attention_backend="flashinfer")
    assert (found.dtype, found.attention_backend) == ("bfloat16", "flashinfer")
