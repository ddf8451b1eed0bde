"""The scheduler process: the shell around the pure `Scheduler`.

Owns the scheduler's channels, its clock and its pulse. Invariant: all messages that wait are one
step's inputs; commands are carried out in order; a page is read only when the scheduler asks.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeGuard

from diptych.engine.core.messages import (
    Abort,
    Address,
    AnyMessage,
    ApiDown,
    ApiUp,
    AskPage,
    Closed,
    Drain,
    Joined,
    PageRows,
    PoolDown,
    PoolUp,
    Progress,
    Send,
    Submit,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import Epoch, PoolId
from diptych.scheduler.commands import PageEntry, PoolRead, ReadPool, SchedulerInput
from diptych.scheduler.scheduler import Scheduler
from diptych.server.boot import HostBoot
from diptych.server.collector import calm_collector
from diptych.server.lifeline import die_by_thread
from diptych.server.logs import configure_logs
from diptych.server.run_dir import remove_run_dir
from diptych.transfer.channels import SUPERVISOR, Channels
from diptych.transfer.control_page import ControlPage
from diptych.transfer.processes import name_process, process_name

TICK_S: Final = 0.1
_INPUTS: Final = (
    Submit,
    Abort,
    Closed,
    Joined,
    Progress,
    WorkerUp,
    WorkerDown,
    PoolUp,
    PoolDown,
    ApiUp,
    ApiDown,
)

_log = logging.getLogger("diptych")


class SchedulerProcess:
    """The loop of one scheduler incarnation. `run` returns when it is told to end."""

    def __init__(
        self,
        channels: Channels,
        scheduler: Scheduler,
        pages: Mapping[PoolId, ControlPage],
        pulse: ControlPage,
    ) -> None:
        self._channels = channels
        self._scheduler = scheduler
        self._pages = pages
        self._pulse = pulse
        self._ended = False

    def run(self) -> None:
        self._channels.announce()
        while not self._ended:
            self._turn(self._inputs(TICK_S))
            self._pulse.beat(0)

    def _inputs(self, timeout_s: float) -> list[SchedulerInput]:
        inputs: list[SchedulerInput] = []
        for message in self._channels.receive(timeout_s):
            if isinstance(message, PageRows):
                inputs += self._page_of_another_host(message)
            elif self._is_input(message):
                inputs.append(message)
        return inputs

    def _turn(self, inputs: list[SchedulerInput]) -> None:
        while True:
            commands = self._scheduler.step(inputs, time.monotonic())
            inputs = []
            for command in commands:
                if isinstance(command, Send):
                    self._channels.send(command)
                elif command.pool in self._pages:
                    inputs.append(self._read(command))
                else:
                    ask = AskPage(self._channels.me.epoch, command.pool)
                    self._channels.send_to(SUPERVISOR, ask)
            if not inputs:
                return

    def _read(self, command: ReadPool) -> PoolRead:
        started_s = time.monotonic()
        generations, entries = self._pages[command.pool].read_all()
        rows = [PageEntry(entry.block, entry.hash, entry.parent) for entry in entries]
        elapsed_ms = (time.monotonic() - started_s) * 1e3
        _log_read(command.pool, len(rows), len(generations), f"read in {elapsed_ms:.1f} ms")
        return PoolRead(command.pool, generations, rows)

    def _page_of_another_host(self, page: PageRows) -> list[PoolRead]:
        if page.scheduler_epoch != self._channels.me.epoch:
            return []  # an older scheduler asked
        rows = [PageEntry(*entry) for entry in page.entries]
        _log_read(page.pool, len(rows), len(page.generations), "told by its host")
        return [PoolRead(page.pool, page.generations, rows)]

    def _is_input(self, message: AnyMessage) -> TypeGuard[SchedulerInput]:
        if isinstance(message, _INPUTS):
            return True
        if isinstance(message, Drain):
            self._ended = True
        else:
            _log.error("dropped a %s, which no scheduler takes", type(message).__name__)
        return False


def _log_read(pool: PoolId, known: int, blocks: int, how: str) -> None:
    _log.info("pool %d: %d of %d blocks hold a known prefix (%s)", pool, known, blocks, how)


def run_scheduler(boot: HostBoot, epoch: Epoch) -> None:
    """The life of a forked scheduler; it outlives the supervisor only to remove the run dir."""
    me = Address("scheduler", 0, epoch)
    configure_logs(f"{process_name(me)}.{epoch}", boot.log_level)
    name_process(process_name(me))
    run_dir = Path(boot.run_dir)
    die_by_thread(boot.lifeline_fd, lambda: remove_run_dir(run_dir))
    layout = boot.layout
    pages = {pool.pool: layout.map_page(pool.pool) for pool in layout.pools}
    scheduler = Scheduler(epoch, boot.options.scheduler, boot.options.cache)
    channels = Channels(run_dir, me, boot.network)
    calm_collector()
    SchedulerProcess(channels, scheduler, pages, layout.map_pulse()).run()
    channels.close()
