"""SGLang's flags with a full-attention model: a meaning, or one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.server import SGLANG
from helpers.launch_probe import run
from helpers.upstream_shapes import RESOLVES_LATER, cuda_graph_config, raw_args, settled
from helpers.warm_start import run_python
from sglang_dllm.config.refused_flags import REFUSED, REFUSED_BEGINNINGS
from sglang_dllm.demo import demo_path
from sglang_dllm.errors import ConfigError
from sglang_dllm.upstream.compat import flag_defaults

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def ours(**fields: object) -> Any:
    """The settled flags of a launch of the demo model."""
    fields.setdefault("model_path", str(demo_path()))
    fields.setdefault("dllm_algorithm", "FullAttnMultiBlock")
    return settled(raw_args(**fields))


def test_what_a_full_prefill_needs_is_set() -> None:
    args = ours(device="cpu")
    assert args.disable_radix_cache and args.disable_overlap_schedule
    assert args.disable_cuda_graph and args.chunked_prefill_size == -1
    assert args.max_running_requests > 1
    assert args.attention_backend is None


def test_a_gpu_gets_flashinfer_and_the_users_choice_stays() -> None:
    args = ours(device="cuda", dtype="bfloat16")
    assert args.attention_backend == "flashinfer"
    args = ours(device="cuda", attention_backend="triton", max_running_requests=3)
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
        ("attn_dp_size", 2),
        ("prefill_decode_interval", 2),
        ("enable_watermark", True),
        ("enable_priority_scheduling", True),
        ("cuda_graph_backend_prefill", "breakable"),
        ("cuda_graph_backend_decode", "tc_piecewise"),
        ("disable_cuda_graph_padding", True),
        ("attention_backend", "fa3"),
        ("kv_cache_dtype", "fp4_e2m1"),
        ("grpc_mode", True),
        ("smg_grpc_mode", True),
        ("tokenizer_worker_num", 2),
        ("use_ray", True),
        ("detokenizer_worker_num", 2),
        ("grpc_port", 31_000),
        ("nnodes", 2),
        ("enable_kv_cache_sharding", True),
        ("enable_return_aux_hidden_states", True),
        ("prefill_only_disable_kv_cache", True),
        ("hicache_size", 2),
        ("speculative_num_steps", 2),
        ("model_impl", "transformers"),
        ("encoder_only", True),
        ("dllm_algorithm", None),
        ("dllm_algorithm", "JointThreshold"),
    ],
)
def test_a_flag_without_a_meaning_is_refused_by_name(field: str, value: object) -> None:
    if field not in flag_defaults(raw_args()):
        pytest.skip("this SGLang has no such flag")
    with pytest.raises(ConfigError) as error:
        ours(**{field: value})
    message = str(error.value)
    flag = "no-dllm-fdfo" if field == "dllm_fdfo" else field.replace("_", "-")
    assert f"--{flag}" in message and "\n" not in message


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_the_rust_server_would_check_no_request(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", value)
    with pytest.raises(ConfigError) as error:
        ours()
    assert str(error.value) == (
        f"SGLANG_RUST_SERVER={value!r} has no use for LLaDAModelLM: its processes load "
        "no plugin, so that no request would be checked; leave it out"
    )
    monkeypatch.setenv("SGLANG_RUST_SERVER", "0")
    ours()


@pytest.fixture(autouse=True)
def the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch writes one variable; the tests of other modules must not see it."""
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "0")


def test_float32_is_not_for_flashinfer() -> None:
    args = ours(device="cuda", dtype="float32")
    assert args.attention_backend == "triton"
    with pytest.raises(ConfigError, match="--dtype='float32' needs"):
        ours(device="cuda", dtype="float32", attention_backend="flashinfer")


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
    args = raw_args(
        model_path=str(demo_path()), dllm_algorithm="FullAttnMultiBlock", **flags
    )
    assert settled(args).disable_decode_cuda_graph is is_off
    config = cuda_graph_config(args)
    assert config.decode.backend == config.prefill.backend == "disabled"


def test_chunks_switched_off_by_hand_are_fine() -> None:
    ours(chunked_prefill_size=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("-c", SGLANG, "serve"), ("-m", "sglang.launch_server")]
)
def test_a_wrong_yaml_ends_the_launch_with_one_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "dllm.yaml"
    file.write_text("threshold: -1\n")
    words = [
        *command,
        *("--model-path", str(demo_path())),
        *("--dllm-algorithm", "FullAttnMultiBlock"),
        *("--dllm-algorithm-config", str(file)),
    ]
    done = run_python(words, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "sglang-dllm:" in line] == [
        "sglang-dllm: error: --dllm-algorithm-config: threshold=-1 is not allowed; "
        "expected nats, 0 to 1000"
    ]


@pytest.mark.slow
def test_the_launch_line_of_d3llm_is_accepted(tmp_path: Path) -> None:
    """As it stands, with a checkpoint that names remote code. None of that runs."""
    folder = tmp_path / "llada"
    shutil.copytree(demo_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_llada", "modeling_llada"):
        (folder / f"{module}.py").write_text("raise SystemExit('it ran')\n")
    launches: list[dict[str, Any]] = [
        {
            "arguments": [
                *("launch", "--model-path", str(folder)),
                *("--dllm-algorithm", "FullAttnMultiBlock", "--trust-remote-code"),
                *("--attention-backend", "flashinfer", "--mem-fraction-static", "0.8"),
                *form.split(),
            ],
            "plugins": None,
        }
        for form in ("--cuda-graph-max-bs 32", "--cuda-graph-max-bs=32")
    ]
    for found in run(launches, OFFLINE):
        assert found["error"] is None, found["stderr"][-3000:]
        assert found["reads"] == []
        assert found["flags"] == {
            "trust_remote_code": False,
            "attention_backend": "flashinfer",
            "mem_fraction_static": 0.8,
            "cuda_graph_max_bs_decode": 32,
            "disable_decode_cuda_graph": False,
            "tokenizer_path": str(folder),
            "json_model_override_args": "{}",
            "max_total_tokens": None if torch.cuda.is_available() else 32_768,
        }


@pytest.mark.slow
def test_doctor_finds_this_installation_sound_and_a_filtered_plugin_not() -> None:
    words = ["-m", "sglang_dllm", "doctor"]
    sound = run_python(words, timeout=300)
    assert sound.returncode == 0, sound.stdout
    for word in (version("sglang"), "LLaDAModelLM", "DreamModel", "FullAttnMultiBlock"):
        assert word in sound.stdout
    broken = run_python(words, 300, {"SGLANG_PLUGINS": "something_else"})
    assert broken.returncode == 1
    assert "SGLANG_PLUGINS" in broken.stdout.strip().splitlines()[-1]


def test_demo_path_prints_the_checkpoint() -> None:
    command = [sys.executable, "-m", "sglang_dllm", "demo-path"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (Path(done.stdout.strip()) / "config.json").is_file()


def test_the_page_has_the_table_of_refused_flags() -> None:
    rows: dict[str, set[str]] = {}
    for table, end in ((REFUSED, ""), (REFUSED_BEGINNINGS, "*")):
        for name, reason in table.items():
            flag = "--" + name.replace("_", "-") + end
            rows.setdefault(reason, set()).add(flag)
    page = Path(__file__).parents[2] / "docs" / "launch.md"
    found = {
        reason: set(re.findall("`(--[^`]*)`", flags))
        for reason, flags in re.findall(
            r"^\| ([^|]*) \| (`--[^|]*) \|$", page.read_text(), re.M
        )
    }
    assert found == rows


def test_every_refused_flag_is_one_of_sglang() -> None:
    """A name that a tested version lacks is another one's; a beginning may be too."""
    known = set(flag_defaults(raw_args()))
    others = {"aux_hidden_state_capture", "cuda_graph_tc_compiler"}
    new = {name for name in REFUSED if name not in known} - others
    if RESOLVES_LATER:
        assert new == set()
    for beginning in REFUSED_BEGINNINGS:
        assert not RESOLVES_LATER or any(n.startswith(beginning) for n in known)


def test_a_field_that_follows_another_flag_is_not_the_users() -> None:
    """SGLang 0.5.17 copies --quantization to the flag of a draft model."""
    copied = {"quantization": "fp8", "speculative_draft_model_quantization": "fp8"}
    assert ours(**copied).quantization == "fp8"
