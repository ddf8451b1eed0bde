"""Configuration: nested, frozen, validated once; each constructor gets only the part it needs.

Owns the defaults. Environment variables are read in server/cli only.
"""

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
Transfer = Literal["auto", "shm", "tcp", "nixl"]
RankLink = Literal["auto", "shm", "gloo"]


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


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of one worker may hold."""

    max_num_batched_tokens: int = 512
    max_chunk_tokens: int | None = None  # cap of one prefill chunk; None: the whole budget
    max_num_seqs: int = 256


class WorkerSpec(msgspec.Struct, frozen=True, array_like=True):
    """One worker: its number, its pool, its dial (share of step time for prefill, 0..100), and over
    how many ranks (processes) its model is spread."""

    worker: int
    pool: int
    dial: int
    num_ranks: int = 1


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
    threads: int | None = None  # of one process at most; None: as many as it has cores
    cpu_cores: str | None = None  # of all workers of a host: a count or a list; None: all
    prefill_core_share: int = 50  # percent of the cores, while prefill and decode are both busy
    tensor_parallel_size: int = 1  # ranks of each worker
    prefill_tp: int | None = None  # of each prefill worker, where that differs
    decode_tp: int | None = None
    rank_link: RankLink = "auto"  # how the ranks of a worker exchange what they add up
    hang_s: float = 3.0  # a progress counter still for this long, with work, is a hang

    def workers(self) -> list[WorkerSpec]:
        """Prefill workers first, then decode, then mixed; pools are numbered from 0."""
        tp = self.tensor_parallel_size
        kinds = (
            (self.prefill, 100, self.prefill_tp or tp),
            (self.decode, 0, self.decode_tp or tp),
            (self.mixed, 50, tp),
        )
        places = [
            (pool if self.separate_pools else 0, dial, num_ranks)
            for pool, (count, dial, num_ranks) in enumerate(kind for kind in kinds if kind[0])
            for _ in range(count)
        ]
        return [WorkerSpec(worker, *place) for worker, place in enumerate(places)]

    @property
    def num_shards(self) -> int:
        """Into how many shards the model is cut, on every host and inline: the ranks of any worker
        share them out evenly, so that all workers compute equal bits."""
        tp = self.tensor_parallel_size
        return lcm(tp, self.prefill_tp or tp, self.decode_tp or tp)

    def verify(self) -> None:
        self.cache.verify()
        if min(self.prefill, self.decode, self.mixed) < 0:
            raise ConfigError("worker counts cannot be negative")
        if not self.mixed and not (self.prefill and self.decode):
            raise ConfigError("need --prefill N and --decode N of at least 1 each, or --mixed N")
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
