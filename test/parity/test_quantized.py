"""Quantized checkpoints of LLaDA and Dream load whole, and compute what they hold."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.other_process import run_module
from helpers.quantized_checkpoints import SCHEMES, edit_config, quantize_folder
from helpers.tiny_checkpoints import write_dream, write_llada
from helpers.tiny_llama_checkpoints import LLADA_MOE_FLAGS, write_llada_moe
from reference.models import load

TOLERANCE = 1e-4
VOCAB_SIZE = 320  # a multiple of what a packed head needs
BATCHES = [[33], [5, 40, 3]]


def tiny_llada(path: Path) -> Path:
    sizes = {"d_model": 256, "n_kv_heads": 2, "mlp_hidden_size": 384}
    return write_llada(path, **sizes, vocab_size=VOCAB_SIZE)


def tiny_dream(path: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384}
    return write_dream(path, **sizes, vocab_size=VOCAB_SIZE)


def tiny_moe(path: Path) -> Path:
    sizes = {"hidden_size": 256, "expert_intermediate_size": 128, "num_experts": 2}
    return write_llada_moe(path, **sizes, num_key_value_heads=2, num_hidden_layers=1)


FAMILIES = {"llada": tiny_llada, "dream": tiny_dream}
LEFT_OUT = {
    "llada": (
        "model.transformer.ff_out",
        "model.transformer.blocks.1.ff_out",
        *(f"model.transformer.blocks.0.{x}_proj" for x in "qkv"),
    ),
    "dream": (
        "lm_head",
        "model.layers.1.mlp.down_proj",
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"),
    ),
}
LEFT_AS_THEY_ARE = {(0, "self_attn.qkv"), (1, "mlp.down")}
"""The layers of ``LEFT_OUT`` by their index and our name."""
LISTS = {"fp8": "modules_to_not_convert", "ct-fp8-channels": "ignore"}
"""Schemes, each with the config key that lists the layers it leaves out."""

VARIANTS = [f"{family}/{scheme}" for family in FAMILIES for scheme in SCHEMES]
PARTLY = [f"{family}/{scheme}/partly" for family in FAMILIES for scheme in LISTS]
MOE = ["fp8", "ct-fp8-channels", "ct-int4", "awq-marlin", "gptq-marlin"]
"""Schemes in which LLaDA-MoE is loaded but not computed."""

BROKEN: dict[str, tuple[str, str, torch.Tensor | None]] = {
    "no-scale": ("fp8", "weight_scale", None),
    "no-input-scale": ("ct-fp8-static", "input_scale", None),
    "no-zeros": ("awq", "qzeros", None),
    "no-weight": ("gptq-marlin", "qweight", None),
    "no-order": ("gptq-marlin-ordered", "g_idx", None),
    "unknown-scale": ("fp8", "output_scale", torch.ones(())),
    "unknown-bias": ("gptq-marlin", "bias", torch.ones(128)),
    "unknown-zero-bias": ("fp8", "bias", torch.zeros(128)),
    "layer-that-awq-left-out": ("awq", "weight", torch.zeros(128, 256)),
}
"""A scheme of LLaDA's, a tensor of one key projection, and its value: a tensor that
the projection must not have, or None to leave it out."""
_KEY = "model.transformer.blocks.1.k_proj"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By variant: the results of ``run_quantized``, and as ``wanted`` the logits of the
    dense twin."""
    root = tmp_path_factory.mktemp("quantized")
    wanted: dict[str, list[list[torch.Tensor]]] = {}
    jobs: dict[str, tuple[str, tuple[str, ...], list[Any]]] = {}
    rng = random.Random(0)
    batches = [[rng.choices(range(VOCAB_SIZE), k=n) for n in lens] for lens in BATCHES]
    for variant in VARIANTS + PARTLY:
        family, name, *partly = variant.split("/")
        scheme = SCHEMES[name]
        folders = [FAMILIES[family](root / f"{variant}-{x}") for x in ("q", "plain")]
        left_out = LEFT_OUT[family] if partly else ()
        quantize_folder(*folders, scheme, left_out)
        if left_out:
            edit_config(folders[0], {LISTS[name]: list(left_out)})
        jobs[variant] = str(folders[0]), scheme.flags, batches
        plain = load(folders[1])
        wanted[variant] = [
            [plain.raw_logits(torch.tensor(ids)) for ids in batch] for batch in batches
        ]
    for name in MOE:
        folders = [tiny_moe(root / f"moe-{name}-{x}") for x in ("q", "plain")]
        quantize_folder(*folders, SCHEMES[name], ("model.layers.0.mlp.gate",))
        jobs[f"moe/{name}"] = str(folders[0]), LLADA_MOE_FLAGS, []
    for name, (scheme, leaf, tensor) in BROKEN.items():
        path, flags, _ = jobs[f"llada/{scheme}"]
        tensors = load_file(Path(path) / "model.safetensors")
        tensors.pop(f"{_KEY}.{leaf}", None)
        tensors |= {} if tensor is None else {f"{_KEY}.{leaf}": tensor}
        folder = tiny_llada(root / name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((Path(path) / "config.json").read_text())
        jobs[name] = str(folder), flags, []
    torch.save(list(jobs.values()), root / "job.pt")
    run_module("helpers.run_quantized", root / "job.pt", root / "out.pt")
    found = dict(zip(jobs, torch.load(root / "out.pt"), strict=True))
    return {name: found[name] | {"wanted": wanted.get(name)} for name in found}


@pytest.mark.parametrize("variant", VARIANTS + PARTLY)
def test_the_logits_are_those_of_the_weights_it_stands_for(
    variant: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcome = outcomes[variant]
    assert "error" not in outcome, outcome["error"]
    for ours, plain in zip(outcome["logits"], outcome["wanted"], strict=True):
        for one, other in zip(ours, plain, strict=True):
            assert one.std() > 0.5
            assert (one - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS + PARTLY)
def test_every_tensor_lands_and_every_parameter_is_written(
    variant: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[variant]["unwritten"] == set()
    for name, parameters in outcomes[variant]["landed"].items():
        leaf = name.rpartition(".")[2]
        if variant.endswith("zero-biases") and isinstance(parameters, str):
            # The changed bias is no longer zero, and no parameter takes it.
            assert f"unknown tensor '{name}'" in parameters
            continue
        assert len(parameters) == 1, (name, parameters)
        assert next(iter(parameters)).endswith(f".{leaf}"), (name, parameters)


@pytest.mark.parametrize("variant", VARIANTS + PARTLY)
def test_sglangs_own_methods_compute_it(
    variant: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    """A layer that the checkpoint leaves out is computed without a scheme."""
    methods, scheme = outcomes[variant]["methods"], SCHEMES[variant.split("/")[1]]
    for layer in range(2):
        for name in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down"):
            wanted = scheme.computed_by
            if variant in PARTLY and (layer, name) in LEFT_AS_THEY_ARE:
                wanted = "UnquantizedLinearMethod"
            assert methods[f"layers.{layer}.{name}_proj"] == wanted
    assert (methods["lm_head"] == scheme.computed_by) == scheme.head_too


def test_a_listed_head_gets_our_name() -> None:
    from sglang_dllm.models.llada import LLaDAModelLM

    mapper = LLaDAModelLM.hf_to_sglang_mapper
    assert mapper.apply_list(["model.transformer.ff_out"]) == ["lm_head"]


@pytest.mark.parametrize("name", MOE)
def test_every_tensor_of_experts_lands(
    name: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcome = outcomes[f"moe/{name}"]
    # Only orders of inputs are left, which have no use without desc_act.
    assert all(re.search(r"\.experts\..*g_idx", x) for x in outcome["unwritten"])
    for tensor, parameters in outcome["landed"].items():
        assert len(parameters) == 1, (tensor, parameters)
        assert next(iter(parameters)).endswith(tensor.rpartition(".")[2])


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_missing_or_unknown_is_named(
    name: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    _, leaf, tensor = BROKEN[name]
    lacks = f"lacks 'layers.1.self_attn.k_proj.{leaf}'"
    unknown = f"unknown tensor '{_KEY}.{leaf}'"
    assert (lacks if tensor is None else unknown) in outcomes[name]["error"]
