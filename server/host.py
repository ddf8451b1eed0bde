"""One host as its supervisor sees it: memory, processes, their exits and pulses. Decides nothing.

Owns the run directory, the shared memory, the lifeline, the signals and every process that was
started here. The head's supervisor and the agents of other hosts are both built on it. Invariant:
when it is closed, or its process ends in whatever way, everything that it started ends and nothing
of it is left.
"""

import logging
import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

import zmq

from diptych.engine.core.config import WORKERS_MAX, EngineOptions, WorkerSpec
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Address
from diptych.engine.core.model_config import load_model_config
from diptych.engine.core.sharding import cut
from diptych.server.boot import HostBoot, HostLayout, PoolLayout
from diptych.server.children import Children
from diptych.server.companion import Companion
from diptych.server.cpu_cores import host_cores
from diptych.server.fleet_members import State
from diptych.server.launcher import Launcher, LauncherEvent, ProcessExited, ProcessStarted
from diptych.server.lifeline import adopt_orphans
from diptych.server.process_table import ProcessTable
from diptych.server.run_dir import create_run_dir, remove_run_dir
from diptych.server.warm_launcher import WarmLauncher
from diptych.transfer.channels import SUPERVISOR, Channels
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.core_table import CoreTable, rank_slots
from diptych.transfer.network import Network
from diptych.transfer.nixl_wire import require_nixl
from diptych.transfer.shared_memory import create_memory

TICK_S: Final = 0.1
KILL_S_MAX: Final = 5.0  # for SIGKILL to do its work
_SIGNALS: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("diptych")


class Host:
    """`open` once, in the main thread (for the signals), then `close`."""

    def __init__(
        self,
        options: EngineOptions,
        workers: Sequence[WorkerSpec],
        *,
        transfer_key: str,
        network: Network | None,
        log_level: str,
        devices: Sequence[str] = (),
    ) -> None:
        layout = plan_layout(options, workers)  # first, so that a bad model costs nothing
        self.run_dir, self._lock_fd = create_run_dir()
        try:
            self.channels = Channels(self.run_dir, SUPERVISOR)
        except ConfigError:
            remove_run_dir(self.run_dir)
            raise
        self.lifeline_fd, self._lifeline_write = os.pipe2(os.O_CLOEXEC)
        self.layout = layout
        self.model_path = options.model.path
        self._boot = HostBoot(
            run_dir=str(self.run_dir),
            options=options,
            layout=layout,
            lifeline_fd=self.lifeline_fd,
            transfer_key=transfer_key,
            network=network,
            devices=list(devices),
            log_level=log_level,
        )
        self._pages = {pool.pool: layout.map_page(pool.pool) for pool in layout.pools}
        self._pulse = layout.map_pulse()
        self._cores = CoreTable(layout.map_cores(), rank_slots(layout.workers))
        for slot, spec in enumerate(layout.workers):
            self._cores.introduce(slot, spec.dial)
        self.table = ProcessTable(self.run_dir)
        self.launcher: Launcher | None = None  # None: it has no workers
        self.companion: Companion | None = None
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def open(self) -> None:
        """From now exits are seen, and the model is loaded if there are workers."""
        adopt_orphans()
        self._previous = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        self._previous_fd = signal.set_wakeup_fd(self._signal_write)
        self.children = Children(self._boot)
        if self.layout.workers:
            self.launcher = WarmLauncher(self._boot)

    # ---- hearing

    def wait(self, timeout_s: float, others: "Iterable[int | zmq.Socket[bytes]]" = ()) -> set[int]:
        """Until something may have come; returns which descriptors of `others` are ready."""
        poller = zmq.Poller()
        poller.register(self.channels.inbox, zmq.POLLIN)
        launcher = [] if self.launcher is None else self.launcher.fds()
        for source in [self._signal_read, *launcher, *self.children.fds(), *others]:
            poller.register(source, zmq.POLLIN)
        ready = poller.poll(round(timeout_s * 1000))
        return {source for source, _ in ready if isinstance(source, int)}

    def take_signals(self) -> int:
        """Reaps; returns how often somebody asked for the end."""
        asked = 0
        with suppress(BlockingIOError):
            asked = sum(n != signal.SIGCHLD for n in os.read(self._signal_read, 4096))
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.children.reaped(*ended)
                if self.launcher is not None:
                    self.launcher.reaped(*ended)
                if self.companion is not None:
                    self.companion.reaped(*ended, time.monotonic())
        return asked

    def events(self) -> list[LauncherEvent]:
        """What became of the processes; the table knows it already."""
        now = time.monotonic()
        if self.companion is not None:
            self.companion.tick(now)
        events: list[LauncherEvent] = []
        if self.launcher is not None:
            events += self.launcher.events(now)
        events += self.children.events(now)
        for event in events:
            if isinstance(event, ProcessStarted):
                self.table.started(event.address, event.pid)
            elif isinstance(event, ProcessExited):
                self.table.exited(event.address)
                if event.address.kind == "worker":
                    self._cores.rest(self.layout.slot(event.address.number))
        return events

    def pulses(self, running: Iterable[Address]) -> dict[Address, int]:
        """Progress counters of the scheduler and of workers of this host."""
        pools = {spec.worker: (spec.pool, slot) for slot, spec in enumerate(self.layout.workers)}
        readings: dict[Address, int] = {}
        for address in running:
            if address.kind == "scheduler":
                readings[address] = self._pulse.pulse(0).counter
            elif address.kind == "worker" and address.number in pools:
                pool, slot = pools[address.number]
                readings[address] = self._pages[pool].pulse(slot).counter
        return readings

    def page(self, pool: int) -> ControlPage | None:
        """None: the pool is not of this host."""
        return self._pages.get(pool)

    def write_table(self, states: list[tuple[Address, State]]) -> None:
        pid = getattr(self.launcher, "warm_pid", None)
        self.table.update(states, {} if pid is None else {"warm": pid})

    # ---- ending

    def wait_for_exits(self, timeout_s: float) -> None:
        """Until every child, and every worker adopted from the warm parent, was reaped."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            running = 0 if self.launcher is None else self.launcher.num_running()
            if not running + self.children.num_running():
                return
            self.wait(TICK_S)
            self.take_signals()
            self.events()

    def close(self) -> None:
        """Ends all processes and waits for it."""
        if self.companion is not None:
            self.companion.close()
            self.companion = None
        if self.launcher is not None:
            self.launcher.close()
        self.children.close()
        self.wait_for_exits(KILL_S_MAX)
        self.channels.close()
        for fd in (
            self._lifeline_write,
            self.lifeline_fd,
            *self.layout.fds,
        ):
            os.close(fd)
        remove_run_dir(self.run_dir)
        os.close(self._lock_fd)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in zip(_SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)
        os.close(self._signal_read)
        os.close(self._signal_write)


def plan_layout(options: EngineOptions, workers: Sequence[WorkerSpec]) -> HostLayout:
    """Sizes the memory from the model's configuration alone, and creates it."""
    if options.transfer == "nixl":
        require_nixl()
    model, cache = options.model, options.cache
    config = load_model_config(model.path, model.dtype, model.max_model_len)
    cut(config, options.num_shards)  # refuses what cannot be cut
    num_ranks = sum(spec.num_ranks for spec in workers)
    if num_ranks > WORKERS_MAX:
        raise ConfigError(f"one host runs at most {WORKERS_MAX} processes of workers")
    special = {
        pool: options.pool_options(spec.dial for spec in workers if spec.pool == pool)
        for pool in sorted({spec.pool for spec in workers})
    }
    common = cache.kv_cache_dtype
    dtypes = {p: config.kv_dtype(found.kv_cache_dtype, common) for p, found in special.items()}
    block_bytes = {pool: config.block_bytes(cache.block_size, dtypes[pool]) for pool in special}
    alone = config.block_bytes(cache.block_size, config.kv_dtype(common))
    largest = max(block_bytes.values(), default=alone)
    num_blocks = cache.blocks(largest)
    return HostLayout(
        num_blocks=num_blocks,
        block_size=cache.block_size,
        workers=list(workers),
        pools=[
            PoolLayout(
                pool=pool,
                pool_fd=create_memory(f"pool{pool or ''}", num_blocks * block_bytes[pool]),
                page_fd=create_memory(f"page{pool or ''}", page_bytes(num_blocks, len(workers))),
                num_parts=cache.block_size // (found.block_size or cache.block_size),
                dtype=dtypes[pool],
                block_bytes=block_bytes[pool],
            )
            for pool, found in special.items()
        ],
        cores=host_cores(options.cpu_cores),
        cores_fd=create_memory("cores", num_ranks),
        pulse_fd=create_memory("pulse", page_bytes(0, 1)),
    )
