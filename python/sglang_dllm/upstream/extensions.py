"""SGLang's official extension points that the package uses beside hooks, by version."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dllm import SUPPORTED_SGLANG

_NEWEST = SUPPORTED_SGLANG[-1]


@dataclass(frozen=True)
class ExtensionPoint:
    """
    Attributes:
        name: dotted name in SGLang.
        use: the thing of ours that is put there.
        versions: tested versions with which it is used.
    """

    name: str
    use: str
    versions: tuple[str, ...] = SUPPORTED_SGLANG


EXTENSION_POINTS = (
    ExtensionPoint(
        "sglang.srt.plugins.load_plugins",
        "the entry point `sglang_dllm`, which registers all below and the hooks",
    ),
    ExtensionPoint(
        "sglang.srt.platforms.interface.SRTPlatform",
        "the platform of machines without a GPU, by the entry point `sglang_dllm_cpu`",
    ),
    ExtensionPoint(
        "sglang.srt.models.registry.ModelRegistry.models", "our architectures"
    ),
    ExtensionPoint(
        "sglang.srt.dllm.algorithm.algo_name_to_cls",
        "the one algorithm class that runs all algorithms of ours",
    ),
    ExtensionPoint(
        "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        "steps around `handle_missing_default_values`, `handle_dllm_inference` and "
        "`handle_gpu_memory_settings`",
        (_NEWEST,),
    ),
    ExtensionPoint(
        "sglang.srt.dllm.algorithm.base.DllmAlgorithm.supported_architectures",
        "the architectures that our algorithm decodes",
        (_NEWEST,),
    ),
    ExtensionPoint(
        "sglang.srt.platforms.interface.SRTPlatform.capabilities",
        "the CPU platform has no Triton and no PyNccl",
        (_NEWEST,),
    ),
)
