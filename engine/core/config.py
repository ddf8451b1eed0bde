"""Configuration: nested, frozen, validated once; each constructor gets only the part it needs.

Owns the defaults. Environment variables are read in server/cli only.
"""

from collections.abc import Iterable
from math import lcm
from typing import Final, Literal

import msgspec

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.types import HASH_UNIT_TOKENS

WORKERS_MAX: Final = 64  # of one host
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal[
    "int8", "int4", "int4-g32", "int4-g64", "int4-g128", "w8a8", "w4a8", "w4a8-g32", "w4a8-g128"
]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Transfer = Literal["auto", "shm", "tcp", "nixl"]
RankLink = Literal["auto", "shm", "gloo"]

TTFT_SLO_S: Final = 2.0
ITL_SLO_S: Final = 0.2
"""What the other target is taken for when only one is given."""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights to serve and how to hold them."""

    path: str  # a local folder (already resolved)
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # tokens; None: the model's own
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights, for tests and benches
    kernels: str = "auto"  # auto | cpp | reference
    kernel_level: str | None = None
    packed_cache: str | None = None  # folder: packed weights are kept there for the next start
    quantization: Quantization | None = None  # of the decoder's linear layers, done at load
    seed: int = 0  # of dummy weights


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int = 16  # tokens
    num_blocks: int | None = None  # None: from `memory_bytes`
    memory_bytes: int = 1 << 30
    kv_cache_dtype: KVCacheDtype = "auto"  # of every pool that does not say; auto: the model's
    enable_prefix_caching: bool = True

    def blocks(self, block_bytes: int) -> int:
        """Blocks of the pool, given the bytes of one."""
        return self.num_blocks or max(2, self.memory_bytes // block_bytes)

    def verify(self) -> None:
        if self.block_size < HASH_UNIT_TOKENS or self.block_size % HASH_UNIT_TOKENS:
            raise ConfigError(f"block size must be a multiple of 16, got {self.block_size}")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ConfigError(f"the pool needs at least 2 blocks, got {self.num_blocks}")


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the scheduler. Every queue has a cap, and reaching it is answered with 429."""

    max_num_seqs: int = 256  # sequences on one worker
    max_waiting: int = 1024  # sequences waiting for a place
    max_waiting_tokens: int = 4_194_304  # prompt tokens waiting for a place
    headroom_blocks: int = 2  # granted beyond what a sequence holds
    preemptions_max: int = 3  # per choice; afterwards it is never preempted again
    local_prefill_tokens: int = 32  # uncached prompts up to this are prefilled where they decode
    retry_after_max_s: float = 60.0
    ttft_slo_s: float | None = None  # with either target, workers move between the roles
    itl_slo_s: float | None = None
    steer_s: float = 1.0  # between two looks at what could move
    autoscale: tuple[int, int] | None = None  # fewest and most workers
    idle_s: float = 60.0  # so long fewer workers must have been enough before one leaves
    leave_s: float = 10.0  # so long a leaving worker may finish what it runs

    @property
    def steers(self) -> bool:
        """Whether workers move between prefill and decode."""
        return self.ttft_slo_s is not None or self.itl_slo_s is not None

    @property
    def slo_s(self) -> tuple[float, float]:
        """(time to first token, between tokens): what a missing target is taken for."""
        return self.ttft_slo_s or TTFT_SLO_S, self.itl_slo_s or ITL_SLO_S

    @property
    def pace_s(self) -> float | None:
        """For `BatchOptions.itl_slo_s`."""
        return self.slo_s[1] if self.steers else None

    def verify(self) -> None:
        for slo_s in (self.ttft_slo_s, self.itl_slo_s):
            if slo_s is not None and not 1e-4 <= slo_s <= 3600.0:
                raise ConfigError(f"a target must be between 0.1 ms and an hour, got {slo_s:g} s")
        if self.autoscale is not None and not 0 <= self.autoscale[0] <= self.autoscale[1] >= 1:
            raise ConfigError("autoscaling needs 0 <= min <= max and max >= 1")


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of one worker may hold."""

    max_num_batched_tokens: int = 512
    max_chunk_tokens: int | None = None  # cap of one prefill chunk; None: the whole budget
    # Prompts share a step until it has so many of their tokens: one more would only make the first
    # ones wait. None: fitted to what steps cost (scheduler/knee.py).
    prefill_batch_tokens: int | None = None
    max_num_seqs: int = 256
    itl_slo_s: float | None = None  # a step with decodes takes no more prefill than this leaves


class WorkerSpec(msgspec.Struct, frozen=True, array_like=True):
    """One worker: its number, its pool, its dial (share of step time for prefill, 0..100), and over
    how many ranks (processes) its model is spread."""

    worker: int
    pool: int
    dial: int
    num_ranks: int = 1


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pool of one kind of workers differs from what the engine says."""

    block_size: int | None = None  # tokens of the kernels' blocks; None: `CacheOptions.block_size`
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: `CacheOptions.kv_cache_dtype`

    def verify(self, flag: str, block_size: int) -> None:
        if self.block_size is None:
            return
        if self.block_size < HASH_UNIT_TOKENS or self.block_size % HASH_UNIT_TOKENS:
            raise ConfigError(f"{flag} must be a multiple of 16, got {self.block_size}")
        if block_size % self.block_size:
            raise ConfigError(
                f"blocks of {self.block_size} and of {block_size} tokens cannot be converted into"
                " each other: the larger must be a multiple of the smaller"
            )


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelOptions
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    batch: BatchOptions = BatchOptions()
    prefill: int = 1  # workers with dial 100
    decode: int = 1  # workers with dial 0
    mixed: int = 0  # workers with dial 50
    separate_pools: bool = False  # prefill, decode and mixed workers each have their own memory
    transfer: Transfer = "auto"  # how blocks move between pools
    several_hosts: bool = False  # each with pools of its own
    elastic_hosts: bool = False  # of one worker each, that come and go as autoscaling asks
    prefill_pool: PoolOptions = PoolOptions()  # of separate pools; the mixed workers' differs in
    decode_pool: PoolOptions = PoolOptions()  # nothing
    threads: int | None = None  # of one process at most; None: as many as it has cores
    cpu_cores: str | None = None  # of all workers of a host: a count or a list; None: all
    prefill_core_share: int = 50  # percent of the cores, while prefill and decode are both busy
    tensor_parallel_size: int = 1  # ranks of each worker
    prefill_tp: int | None = None  # of each prefill worker, where that differs
    decode_tp: int | None = None
    rank_link: RankLink = "auto"  # how the ranks of a worker exchange what they add up
    hang_s: float = 3.0  # a progress counter still for this long, with work, is a hang

    def workers(self) -> list[WorkerSpec]:
        """Prefill workers first, then decode, then mixed; pools are numbered from 0. Then those
        that autoscaling may add, in turn of the kinds that there are."""
        tp = self.tensor_parallel_size
        kinds = (
            (self.prefill, 100, self.prefill_tp or tp),
            (self.decode, 0, self.decode_tp or tp),
            (self.mixed, 50, tp),
        )
        present = [
            (count, (pool if self.separate_pools else 0, dial, num_ranks))
            for pool, (count, dial, num_ranks) in enumerate(kind for kind in kinds if kind[0])
        ]
        places = [place for count, place in present for _ in range(count)]
        most = len(places) if self.scheduler.autoscale is None else self.scheduler.autoscale[1]
        turn = present[-1:] + present[:-1]  # those that decode first
        places += [turn[extra % len(turn)][1] for extra in range(most - len(places))]
        return [WorkerSpec(worker, *place) for worker, place in enumerate(places)]

    @property
    def num_shards(self) -> int:
        """Into how many shards the model is cut, on every host and inline: the ranks of any worker
        share them out evenly, so that all workers compute equal bits."""
        tp = self.tensor_parallel_size
        return lcm(tp, self.prefill_tp or tp, self.decode_tp or tp)

    @property
    def num_started(self) -> int:
        """Workers that run from the start."""
        return self.prefill + self.decode + self.mixed

    def pool_options(self, dials: Iterable[int]) -> PoolOptions:
        """What is special about a pool, by the dials of its workers at the start."""
        kinds = set(dials) if self.separate_pools else set()
        special = {frozenset((100,)): self.prefill_pool, frozenset((0,)): self.decode_pool}
        return special.get(frozenset(kinds), PoolOptions())

    def verify(self) -> None:
        self.cache.verify()
        self.scheduler.verify()
        for flag, pool in (("prefill", self.prefill_pool), ("decode", self.decode_pool)):
            pool.verify(f"--{flag}-block-size", self.cache.block_size)
            if pool != PoolOptions() and (self.several_hosts or not self.separate_pools):
                raise ConfigError(
                    f"a {flag} pool of its own kind needs --separate-pools, and a single host"
                )
        self._verify_kv_dtypes()
        if min(self.prefill, self.decode, self.mixed) < 0:
            raise ConfigError("worker counts cannot be negative")
        if not self.mixed and not (self.prefill and self.decode):
            raise ConfigError("need --prefill N and --decode N of at least 1 each, or --mixed N")
        scale = self.scheduler.autoscale
        if scale is not None and not scale[0] <= self.num_started <= scale[1]:
            raise ConfigError(
                f"--autoscale {scale[0]}:{scale[1]} does not hold the {self.num_started} workers"
                " to start with (--prefill, --decode, --mixed)"
            )
        if scale is not None and self.several_hosts and not self.elastic_hosts:
            raise ConfigError("--autoscale is for one host, or for --ray, which brings more hosts")
        if self.transfer != "auto" and not (self.separate_pools or self.several_hosts):
            raise ConfigError(f"--transfer {self.transfer} needs --separate-pools")
        sizes = [self.tensor_parallel_size, self.prefill_tp, self.decode_tp]
        if any(size is not None and not 1 <= size <= WORKERS_MAX for size in sizes):
            raise ConfigError(f"tensor-parallel sizes must be between 1 and {WORKERS_MAX}")
        if sum(spec.num_ranks for spec in self.workers()) > WORKERS_MAX and not self.several_hosts:
            raise ConfigError(f"one host runs at most {WORKERS_MAX} processes of workers")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"a worker needs at least 1 thread, got {self.threads}")
        if not 0 <= self.prefill_core_share <= 100:
            raise ConfigError(f"a share is 0 to 100 percent, got {self.prefill_core_share}")
        if self.batch.max_num_batched_tokens < 1:
            raise ConfigError("max_num_batched_tokens must be at least 1")
        if self.batch.prefill_batch_tokens is not None and self.batch.prefill_batch_tokens < 1:
            raise ConfigError("prefill_batch_tokens must be at least 1")

    def _verify_kv_dtypes(self) -> None:
        """Pools may differ, but for int8: its scales have no partner in another dtype."""
        pools = [self.prefill_pool, self.decode_pool, *([PoolOptions()] if self.mixed else [])]
        own = [pool.kv_cache_dtype for pool in pools]
        dtypes = {self.cache.kv_cache_dtype if dtype == "auto" else dtype for dtype in own}
        if self.separate_pools and "int8" in dtypes and len(dtypes) > 1:
            other = ", ".join(sorted(dtypes - {"int8"}))
            raise ConfigError(
                f"a pool of int8 KV exchanges blocks with int8 ones only, not with {other}:"
                " give all pools one --kv-cache-dtype"
            )
