"""A torch-only CPU platform for SGLang: no sgl-kernel CPU build needed.

SGLang's own CPU engine wants that build, which no registry carries.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

_KV_POOL_FRACTION = 0.1
"""Share of the machine's memory for weights and KV pool; the rest is not ours."""

_MAX_TOTAL_TOKENS = 32_768
"""KV slots of the pool, where the user sets none: some 60 canvases of 512."""


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on plain torch CPU operators."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open with values that work on a CPU."""
        if server_args.device != "cpu":
            return
        # _handle_cpu_backends has already turned "not given" into intel_amx,
        # which needs the CPU build of sgl-kernel.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        # float16, SGLang's choice for float32 checkpoints, is some 30 times
        # slower than float32 on a CPU.
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        # Without this the scheduler polls, and an idle server takes a whole core.
        server_args.sleep_on_idle = True
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = _KV_POOL_FRACTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = _MAX_TOTAL_TOKENS

    def init_backend(self) -> None:
        """Give SGLang's layers the operators of ``platform.operators``."""
        from sglang_dllm.platform.operators import register

        register(self.get_dispatch_key_name())

    def get_device(self, local_rank: int = 0) -> str:
        # SGLang asks an out-of-tree platform for the value of --device.
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False
