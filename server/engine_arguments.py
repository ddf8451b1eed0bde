"""All that describes an engine, flat and by the names of `Engine`'s arguments; the CLI's flags
become the same.

Owns the way from there to `EngineOptions`, the only one. Invariant: a name that is not here is a
TypeError, as for any other argument.
"""

from pathlib import Path
from typing import Literal, TypedDict

import msgspec

from diptych.engine.core.config import (
    BatchOptions,
    CacheOptions,
    Dtype,
    EngineOptions,
    KVCacheDtype,
    ModelOptions,
    PoolOptions,
    Quantization,
    RankLink,
    SchedulerOptions,
    Transfer,
)
from diptych.engine.core.errors import ConfigError


class MoreArguments(TypedDict, total=False):
    """Those of `EngineArguments` that few programs need."""

    prefill_block_size: int | None
    decode_block_size: int | None
    prefill_kv_cache_dtype: KVCacheDtype
    decode_kv_cache_dtype: KVCacheDtype
    packed_cache: str | Path | None
    kernels: Literal["auto", "cpp", "reference"]
    kernel_level: str | None
    cpu_cores: str | None
    prefill_core_share: int
    prefill_batch_tokens: int | None
    threads: int | None
    transfer: Transfer
    prefill_tp: int | None
    decode_tp: int | None
    rank_link: RankLink
    hang_timeout_s: float


class EngineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """With `separate_pools`, the prefill pool and the decode pool may have other block sizes (in
    tokens; the pool of which none is given keeps `block_size`) and dtypes."""

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    load_format: str = "auto"
    quantization: Quantization | None = None
    packed_cache: str | Path | None = None  # keep packed weights here, map them at the next start
    kernels: str = "auto"  # auto, cpp or reference
    kernel_level: str | None = None  # plain, avx2, avx512, avx512_bf16 or amx (None: the best)
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int = 1 << 30
    kv_cache_dtype: KVCacheDtype = "auto"
    enable_prefix_caching: bool = True
    separate_pools: bool = False
    prefill_block_size: int | None = None
    decode_block_size: int | None = None
    prefill_kv_cache_dtype: KVCacheDtype = "auto"
    decode_kv_cache_dtype: KVCacheDtype = "auto"
    transfer: Transfer = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    max_chunk_tokens: int | None = None
    prefill_batch_tokens: int | None = None
    max_waiting: int = 1 << 20  # a program waits for its own requests; a server refuses some
    ttft_slo_s: float | None = None
    itl_slo_s: float | None = None
    autoscale: tuple[int, int] | None = None
    scale_down_delay_s: float = 60.0
    tensor_parallel_size: int = 1
    prefill_tp: int | None = None
    decode_tp: int | None = None  # of each decode worker, where that differs
    rank_link: RankLink = "auto"
    threads: int | None = None  # of one process at most
    cpu_cores: str | None = None  # of all workers: a count, or a list as "0-3,8"
    prefill_core_share: int = 50  # percent of the cores, while prefill and decode are both busy
    hang_timeout_s: float = 3.0  # until a hang is fenced

    def options(
        self, model_path: str, *, several_hosts: bool = False, elastic_hosts: bool = False
    ) -> EngineOptions:
        """Not verified yet, except for what its types cannot say (ConfigError)."""
        scheduler = self._scheduler()
        prefill, decode = self._block_sizes()
        return EngineOptions(
            model=self._model(model_path),
            cache=CacheOptions(
                block_size=max(self.block_size, prefill or 0, decode or 0),
                num_blocks=self.num_blocks,
                memory_bytes=self.kv_cache_memory_bytes,
                kv_cache_dtype=self.kv_cache_dtype,
                enable_prefix_caching=self.enable_prefix_caching,
            ),
            scheduler=scheduler,
            batch=BatchOptions(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_chunk_tokens=self.max_chunk_tokens,
                prefill_batch_tokens=self.prefill_batch_tokens,
                max_num_seqs=self.max_num_seqs,
                itl_slo_s=scheduler.pace_s,
            ),
            prefill=self.prefill,
            decode=self.decode,
            mixed=self.mixed,
            separate_pools=self.separate_pools,
            transfer=self.transfer,
            several_hosts=several_hosts,
            elastic_hosts=elastic_hosts,
            prefill_pool=PoolOptions(
                block_size=prefill, kv_cache_dtype=self.prefill_kv_cache_dtype
            ),
            decode_pool=PoolOptions(block_size=decode, kv_cache_dtype=self.decode_kv_cache_dtype),
            threads=self.threads,
            cpu_cores=self.cpu_cores,
            prefill_core_share=self.prefill_core_share,
            tensor_parallel_size=self.tensor_parallel_size,
            prefill_tp=self.prefill_tp,
            decode_tp=self.decode_tp,
            rank_link=self.rank_link,
            hang_s=self.hang_timeout_s,
        )

    def _model(self, path: str) -> ModelOptions:
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format must be 'auto' or 'dummy', got {self.load_format!r}")
        return ModelOptions(
            path=path,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            load_format="dummy" if self.load_format == "dummy" else "auto",
            packed_cache=None if self.packed_cache is None else str(self.packed_cache),
            quantization=self.quantization,
            kernels=self.kernels,
            kernel_level=self.kernel_level,
        )

    def _scheduler(self) -> SchedulerOptions:
        return SchedulerOptions(
            max_num_seqs=self.max_num_seqs,
            max_waiting=self.max_waiting,
            ttft_slo_s=self.ttft_slo_s,
            itl_slo_s=self.itl_slo_s,
            autoscale=self.autoscale,
            idle_s=self.scale_down_delay_s,
        )

    def _block_sizes(self) -> tuple[int | None, int | None]:
        """Of the prefill pool and the decode pool; None: the engine's."""
        sizes = (self.prefill_block_size, self.decode_block_size)
        prefill, decode = (size or (self.block_size if any(sizes) else None) for size in sizes)
        return prefill, decode
