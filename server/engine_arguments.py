"""The arguments of `Engine` that few programs need, under the names of the CLI's flags.

Owns no state. Invariant: a name that is not here is a TypeError, as for any other argument; one
that was not given changes nothing.
"""

from pathlib import Path
from typing import Literal, TypedDict

import msgspec

from diptych.engine.core.config import (
    EngineOptions,
    KVCacheDtype,
    PoolOptions,
    RankLink,
)


class MoreArguments(TypedDict, total=False):
    """With `separate_pools`, the prefill pool and the decode pool may have other block sizes (in
    tokens; the pool of which none is given keeps `block_size`) and dtypes."""

    prefill_block_size: int | None
    decode_block_size: int | None
    prefill_kv_cache_dtype: KVCacheDtype
    decode_kv_cache_dtype: KVCacheDtype
    packed_cache: (
        str | Path | None
    )  # keep packed weights in this folder, map them at the next start
    kernels: Literal["auto", "cpp", "reference"]
    kernel_level: str | None  # plain, avx2, avx512, avx512_bf16 or amx (None: the best)
    cpu_cores: str | None  # of all workers: a count, or a list as "0-3,8"
    prefill_core_share: int  # percent of the cores, while prefill and decode are both busy
    rank_link: RankLink
    hang_timeout_s: float  # until a hang is fenced


def pool_kinds(
    block_size: int,
    sizes: tuple[int | None, int | None],
    dtypes: tuple[KVCacheDtype, KVCacheDtype],
) -> tuple[int, PoolOptions, PoolOptions]:
    """The scheduler's block size, which is the largest, and what is special about the prefill pool
    and the decode pool."""
    prefill, decode = (size or (block_size if any(sizes) else None) for size in sizes)
    return (
        max(block_size, prefill or 0, decode or 0),
        PoolOptions(block_size=prefill, kv_cache_dtype=dtypes[0]),
        PoolOptions(block_size=decode, kv_cache_dtype=dtypes[1]),
    )


def with_more(options: EngineOptions, more: MoreArguments) -> EngineOptions:
    """Raises TypeError for a name that is no argument."""
    for name in more:
        if name not in MoreArguments.__annotations__:
            raise TypeError(f"Engine() got an unexpected keyword argument {name!r}")
    replace = msgspec.structs.replace
    block_size, prefill_pool, decode_pool = pool_kinds(
        options.cache.block_size,
        (more.get("prefill_block_size"), more.get("decode_block_size")),
        (more.get("prefill_kv_cache_dtype", "auto"), more.get("decode_kv_cache_dtype", "auto")),
    )
    packed_cache = more.get("packed_cache")
    return replace(
        options,
        model=replace(
            options.model,
            packed_cache=None if packed_cache is None else str(packed_cache),
            kernels=more.get("kernels", options.model.kernels),
            kernel_level=more.get("kernel_level", options.model.kernel_level),
        ),
        cache=replace(options.cache, block_size=block_size),
        prefill_pool=prefill_pool,
        decode_pool=decode_pool,
        cpu_cores=more.get("cpu_cores"),
        prefill_core_share=more.get("prefill_core_share", options.prefill_core_share),
        rank_link=more.get("rank_link", options.rank_link),
        hang_s=more.get("hang_timeout_s", options.hang_s),
    )
