"""SGLang's flags with a full-attention model: a meaning, or one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_dllm.config.launch_flags import architecture_of, settle_launch_flags
from sglang_dllm.demo import demo_path
from sglang_dllm.errors import ConfigError


def raw_args(**fields: object) -> ServerArgs:
    """ServerArgs as the user gave them, before SGLang derives anything."""
    args = object.__new__(ServerArgs)
    for name, field in ServerArgs.__dataclass_fields__.items():
        object.__setattr__(args, name, field.default)
    fields.setdefault("model_path", str(demo_path()))
    fields.setdefault("dllm_algorithm", "FullAttnMultiBlock")
    for name, value in fields.items():
        object.__setattr__(args, name, value)
    return args


def test_what_a_full_prefill_needs_is_set() -> None:
    args = raw_args(device="cpu")
    settle_launch_flags(args, "LLaDAModelLM")
    assert args.disable_radix_cache and args.disable_overlap_schedule
    assert args.disable_cuda_graph and args.chunked_prefill_size == -1
    assert args.max_running_requests > 1
    assert args.attention_backend is None


def test_a_gpu_gets_flashinfer_and_the_users_choice_stays() -> None:
    args = raw_args(device="cuda")
    settle_launch_flags(args, "LLaDAModelLM")
    assert args.attention_backend == "flashinfer"
    args = raw_args(device="cuda", attention_backend="triton", max_running_requests=3)
    settle_launch_flags(args, "LLaDAModelLM")
    assert (args.attention_backend, args.max_running_requests) == ("triton", 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dllm_fdfo", False),
        ("chunked_prefill_size", 512),
        ("enable_mixed_chunk", True),
        ("pp_size", 2),
        ("speculative_algorithm", "EAGLE"),
        ("disaggregation_mode", "prefill"),
        ("enable_hierarchical_cache", True),
        ("enable_lora", True),
        ("enable_dp_attention", True),
        ("skip_tokenizer_init", True),
        ("enable_priority_scheduling", True),
        ("cuda_graph_backend_prefill", "breakable"),
        ("cuda_graph_backend_decode", "tc_piecewise"),
        ("disable_cuda_graph_padding", True),
        ("attention_backend", "fa3"),
        ("kv_cache_dtype", "fp4_e2m1"),
        ("dllm_algorithm", None),
        ("dllm_algorithm", "JointThreshold"),
    ],
)
def test_a_flag_without_a_meaning_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        settle_launch_flags(raw_args(**{field: value}), "LLaDAModelLM")
    message = str(error.value)
    flag = "no-dllm-fdfo" if field == "dllm_fdfo" else field.replace("_", "-")
    assert f"--{flag}" in message and "\n" not in message


def test_float32_is_not_for_flashinfer() -> None:
    args = raw_args(device="cuda", dtype="float32")
    settle_launch_flags(args, "LLaDAModelLM")
    assert args.attention_backend == "triton"
    args = raw_args(device="cuda", dtype="float32", attention_backend="flashinfer")
    with pytest.raises(ConfigError, match="--dtype='float32' needs"):
        settle_launch_flags(args, "LLaDAModelLM")


@pytest.mark.parametrize(
    ("flags", "is_off"),
    [
        ({}, False),
        ({"cuda_graph_backend_decode": "full"}, False),
        ({"disable_cuda_graph": True}, True),
        ({"disable_decode_cuda_graph": True}, True),
        ({"cuda_graph_backend_decode": "disabled"}, True),
        ({"cuda_graph_backend_prefill": "disabled"}, False),
    ],
)
def test_sglangs_own_graphs_are_off_and_ours_follow_its_flags(
    flags: dict[str, Any], is_off: bool
) -> None:
    args = raw_args(**flags)
    settle_launch_flags(args, "LLaDAModelLM")
    assert args.disable_decode_cuda_graph is is_off
    args._parse_cuda_graph_config()
    config = args.cuda_graph_config
    assert config.decode.backend == config.prefill.backend == "disabled"


def test_chunks_switched_off_by_hand_are_fine() -> None:
    settle_launch_flags(raw_args(chunked_prefill_size=-1), "LLaDAModelLM")


def test_the_architecture_is_read_without_loading_anything(tmp_path: Path) -> None:
    assert architecture_of(raw_args()) == "LLaDAModelLM"
    assert architecture_of(raw_args(model_path=str(tmp_path))) is None


def test_an_architecture_given_by_hand_counts() -> None:
    override = '{"architectures": ["DiffuLlamaModel"]}'
    args = raw_args(json_model_override_args=override)
    assert architecture_of(args) == "DiffuLlamaModel"


@pytest.mark.slow
def test_a_wrong_yaml_ends_the_launch_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "dllm.yaml"
    file.write_text("threshold: -1\n")
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(demo_path())),
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "sglang-dllm: error: --dllm-algorithm-config: threshold=-1 is not allowed; "
        "expected nats, 0 to 1000"
    )


@pytest.mark.slow
def test_doctor_finds_this_installation_sound_and_a_filtered_plugin_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [sys.executable, "-m", "sglang_dllm", "doctor"]
    sound = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert sound.returncode == 0, sound.stdout
    for word in ("0.5.17", "LLaDAModelLM", "DreamModel", "FullAttnMultiBlock"):
        assert word in sound.stdout
    monkeypatch.setenv("SGLANG_PLUGINS", "something_else")
    broken = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert broken.returncode == 1
    assert "SGLANG_PLUGINS" in broken.stdout.strip().splitlines()[-1]


def test_demo_path_prints_the_checkpoint() -> None:
    command = [sys.executable, "-m", "sglang_dllm", "demo-path"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (Path(done.stdout.strip()) / "config.json").is_file()
