"""What each process is told when it starts: frozen, JSON, nothing inherited by accident.

Owns the boot records. Invariant: a record travels over a pipe or standard input, never on a command
line, so that no key shows in a process list.
"""

from pathlib import Path

import msgspec

from diptych.engine.core.config import EngineOptions, WorkerSpec
from diptych.engine.core.model_config import KVDtype
from diptych.engine.core.types import ApiId, Epoch, PoolId, WorkerId
from diptych.server.client import EngineInfo
from diptych.server.ray_plan import RayOptions
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.network import Network
from diptych.transfer.shared_memory import SharedMemory


class PoolLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One memory domain."""

    pool: PoolId
    pool_fd: int
    page_fd: int
    num_parts: int = 1  # blocks of the kernels in one block of the scheduler
    dtype: KVDtype
    block_bytes: int


class HostLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one host, fixed before anything starts. All its pools have as many blocks."""

    num_blocks: int  # of each pool
    block_size: int  # tokens
    workers: list[WorkerSpec]  # of this host
    pools: list[PoolLayout]
    cores: list[int]  # that the workers share
    cores_fd: int  # their core table
    pulse_fd: int  # a page without blocks, for the scheduler's pulse

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @property
    def num_ranks(self) -> int:
        """Processes of all workers."""
        return sum(spec.num_ranks for spec in self.workers)

    @property
    def fds(self) -> list[int]:
        pools = [fd for pool in self.pools for fd in (pool.pool_fd, pool.page_fd)]
        return [*pools, self.cores_fd, self.pulse_fd]

    def slot(self, worker: WorkerId) -> int:
        """Its place among the workers of this host; also its pulse, in the page of its pool."""
        return next(i for i, spec in enumerate(self.workers) if spec.worker == worker)

    def spec(self, worker: WorkerId) -> WorkerSpec:
        return self.workers[self.slot(worker)]

    def pool(self, pool: PoolId) -> PoolLayout:
        return next(found for found in self.pools if found.pool == pool)

    def map_cores(self) -> memoryview:
        """The core table; mapped for the life of the process."""
        return SharedMemory(self.cores_fd, self.num_ranks).view

    def map_page(self, pool: PoolId, *, writable: bool = True) -> ControlPage:
        """Mapped for the life of the process."""
        num_bytes = page_bytes(self.num_blocks, self.num_workers)
        memory = SharedMemory(self.pool(pool).page_fd, num_bytes, writable=writable)
        return ControlPage(memory.view, self.num_blocks, self.num_workers)

    def map_pulse(self) -> ControlPage:
        """The scheduler's pulse: slot 0 of a page without blocks."""
        return ControlPage(SharedMemory(self.pulse_fd, page_bytes(0, 1)).view, 0, 1)

    def map_pool(self, pool: PoolId, *, writable: bool = True) -> memoryview:
        """Its blocks; mapped for the life of the process."""
        found = self.pool(pool)
        num_bytes = self.num_blocks * found.block_bytes
        return SharedMemory(found.pool_fd, num_bytes, writable=writable).view


class HostBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For the processes of the supervisor: scheduler, warm parent, workers."""

    run_dir: str
    options: EngineOptions
    layout: HostLayout
    lifeline_fd: int  # ends when the supervisor ends
    transfer_key: str  # hex; who has it may read blocks over the network
    network: Network | None = None  # of a cluster; None: there is only this host
    devices: list[str] = []  # CUDA_VISIBLE_DEVICES of each worker here, in order; none: as it is
    log_level: str = "INFO"


class ApiBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For an API server, whether a child of the supervisor or the caller of `start_engine`.

    It binds its channels at Address("api", api, api_epoch) in `run_dir`, then calls `announce`;
    the supervisor answers with SchedulerUp. `settings` is what the command line gave for it.
    """

    run_dir: str
    api: ApiId
    api_epoch: Epoch
    info: EngineInfo
    settings: dict[str, object] = {}
    listen_fd: int | None = None  # an already listening TCP socket, shared by all API servers
    meters_fd: int | None = None  # memory in which all of them count
    salt_key: str  # hex; one for all, so that a salted prefix is found whoever is asked
    network: Network | None = None
    log_level: str = "INFO"

    @property
    def fds(self) -> list[int]:
        return [fd for fd in (self.listen_fd, self.meters_fd) if fd is not None]

    @property
    def path(self) -> Path:
        return Path(self.run_dir)


class ClusterBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For a head: hosts may join it."""

    network: Network
    port: int = 0  # where agents join; 0: any
    local_workers: bool = True  # False: hosts that join bring all of them
    ray: RayOptions | None = None  # Ray brings the hosts
    model: str = ""  # as the user called it, to be found on each of them; "": where the head has it


class SupervisorBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For a supervisor. Without `api_target` its starter, over `control_fd`, is API server 0."""

    options: EngineOptions
    api_target: str | None = None  # "package.module:function"
    num_apis: int = 1
    settings: dict[str, object] = {}
    listen_fd: int | None = None
    meters_fd: int | None = None
    control_fd: int | None = None  # news go out, its end means stop
    grace_s: float = 30.0
    log_level: str = "INFO"
    cluster: ClusterBoot | None = None


class AgentBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For the supervisor of a further host. `ip` "": the address that it reaches the head from."""

    head: str  # "HOST:PORT"
    secret: str
    ip: str = ""
    place: str = ""
    model_path: str = ""  # of the model on this host; "": where the head has it
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    devices: list[str] = []  # CUDA_VISIBLE_DEVICES of each worker, in that order; none: as it is
    api_host: str = "127.0.0.1"
    api_port: int | None = None  # of an API server here; None: there is none
    lifeline_fd: int | None = None  # whoever started it; its end means end
    orphan_of: str = ""  # "HOST:PORT"; while nobody answers there, it does not
    log_level: str = "INFO"


class ApiProcessBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For an API server process of the supervisor, on its standard input."""

    target: str
    lifeline_fd: int
    api: ApiBoot
