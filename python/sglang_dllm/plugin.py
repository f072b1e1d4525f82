"""The two entry points, through which SGLang loads the package."""

from __future__ import annotations


def activate_platform() -> str | None:
    """``sglang.srt.platforms``: the torch CPU platform, where there is no GPU.

    Returns:
        The dotted name of the platform class, None where SGLang's own serves.
    """
    import os

    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        # The user chose SGLang's own CPU engine.
        return None
    if torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return "sglang_dllm.platform.cpu.TorchCpuPlatform"


def register() -> None:
    """``sglang.srt.plugins``: register configs, hooks, models and the algorithm.

    SGLang calls this in the launching process and in every scheduler.
    """
    from sglang_dllm.models.configs import register_configs
    from sglang_dllm.patches import HOOKS, gpu_memory
    from sglang_dllm.patches.server_args import add_resolution_steps

    register_configs()
    HOOKS.install()
    HOOKS.use(add_resolution_steps)
    HOOKS.use(gpu_memory.add_resolution_step)
    if HOOKS.problem is None:
        _register_models()
        _register_algorithms()


def _register_models() -> None:
    from sglang.srt.models.registry import ModelRegistry

    from sglang_dllm.models.a2d import (
        A2DLlamaLMHeadModel,
        A2DQwen2LMHeadModel,
        A2DQwen3LMHeadModel,
    )
    from sglang_dllm.models.diffullama import DiffuLlamaModel
    from sglang_dllm.models.dream import DreamModel
    from sglang_dllm.models.illada import ILLaDAForCausalLM
    from sglang_dllm.models.llada import LLaDAModelLM
    from sglang_dllm.models.llada_moe import LLaDAMoEModel, LLaDAMoEModelLM

    for model in (
        LLaDAModelLM,
        DreamModel,
        LLaDAMoEModelLM,
        LLaDAMoEModel,
        DiffuLlamaModel,
        ILLaDAForCausalLM,
        A2DQwen3LMHeadModel,
        A2DQwen2LMHeadModel,
        A2DLlamaLMHeadModel,
    ):
        ModelRegistry.models[model.__name__] = model


def _register_algorithms() -> None:
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    from sglang_dllm.runtime.dllm_algorithm import FullAttnAlgorithm
    from sglang_dllm.runtime.dllm_config import SGLANG_NAME

    algo_name_to_cls[SGLANG_NAME] = FullAttnAlgorithm
