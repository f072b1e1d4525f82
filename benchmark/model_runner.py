"""A ModelRunner of SGLang in this process.

One per process, since SGLang's parallel state is global.
"""

from __future__ import annotations

from typing import Any


def load(path: str, *flags: str, rank: int = 0) -> Any:
    """A ModelRunner with its KV pool and attention backend, as the server builds it.

    Args:
        rank: of the tensor-parallel ranks, which need the same ``--nccl-port``.
    """
    from sglang.benchmark.one_batch import load_model
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(
        [
            *("--model-path", path, "--dllm-algorithm", "FullAttnMultiBlock"),
            *("--max-total-tokens", "4096", "--max-running-requests", "8"),
            *flags,
        ]
    )
    _publish(server_args, rank)
    ports = PortArgs.init_new(server_args)
    wrapped, _ = load_model(server_args, ports, rank, rank)
    return next(v for v in vars(wrapped).values() if hasattr(v, "model"))


def _publish(server_args: Any, rank: int) -> None:
    """Make the flags known to this process, as SGLang's own benchmark of a ModelRunner
    does: where resolution is a step of its own, a ModelRunner finds nothing without it.
    """
    if not hasattr(server_args, "resolve_once"):
        return
    from sglang.benchmark.one_batch import _init_process_global_configs
    from sglang.srt.runtime_context import SpawnRanks, publish

    place = SpawnRanks(world_rank=rank, gpu_id=rank)
    publish(server_args, role="scheduler", ranks=place)
    _init_process_global_configs()


def no_prefix_cache(req_to_token_pool: Any, allocator: Any) -> Any:
    """SGLang's prefix cache with ``--disable-radix-cache``: a class of its own, or the
    radix cache itself, whichever SGLang has."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    params = CacheInitParams(
        disable=True,
        req_to_token_pool=req_to_token_pool,
        token_to_kv_pool_allocator=allocator,
        page_size=allocator.page_size,
    )
    try:
        from sglang.srt.mem_cache.chunk_cache import ChunkCache
    except ImportError:
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params.tree_components = (ComponentType.FULL,)
        return UnifiedRadixCache(params)
    return ChunkCache(params)
