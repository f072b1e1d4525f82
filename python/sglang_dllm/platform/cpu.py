"""A CPU platform for SGLang on plain torch.

SGLang's own CPU engine needs a CPU build of sgl-kernel, which no registry has.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_dllm.platform.ranks import RankBinding, end_without_core_dump
from sglang_dllm.upstream.compat import PlatformPools, keep_nccl_away

STATIC_FRACTION = 0.8
"""Share of the machine's free memory for weights and KV pool, at most. The pool takes
what the weights leave of it."""

_MAX_TOTAL_TOKENS = 32_768
"""KV slots of the pool, at most, if the user sets no number: 64 canvases of 512."""


class TorchCpuPlatform(CpuDeviceMixin, PlatformPools):
    """SGLang on plain torch CPU operators."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        self._binding = RankBinding()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set the flags that the user did not give to values that work on a CPU."""
        if server_args.device != "cpu":
            return
        # SGLang's _handle_cpu_backends has replaced "not given" by intel_amx, which
        # fails without the CPU build of sgl-kernel.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        # Models of ours have their dtype by now (config.dtype). SGLang would choose
        # float16 for another model's float32, some 30 times slower on a CPU.
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        # Otherwise the scheduler polls, and an idle server takes a whole core.
        server_args.sleep_on_idle = True
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = STATIC_FRACTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = _MAX_TOTAL_TOKENS
        self._binding.set_for(server_args)
        end_without_core_dump()

    def init_backend(self) -> None:
        """Register the operators of ``platform.operators`` for SGLang's layers.

        SGLang calls this in each process that runs a model.
        """
        from sglang_dllm.platform.operators import register

        keep_nccl_away()
        register(self.get_dispatch_key_name())

    def get_device(self, local_rank: int = 0) -> str:
        # SGLang takes the value of --device from an out-of-tree platform.
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False
