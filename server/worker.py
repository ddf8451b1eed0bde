"""A worker process: the batcher decides, the runner computes, this loop carries messages between.

Owns the process's channels and its pulse. Invariants: page writes and sends happen in the order the
batcher gave them, and a block's entry is voided before the step that writes it; between steps it
never waits for anyone, and without work it sleeps until a message comes.
"""

import logging
import os
from pathlib import Path
from typing import Final, Protocol

from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    Assign,
    Drain,
    Grants,
    Join,
    Revoke,
    Seal,
    Send,
    SetDial,
)
from diptych.engine.core.plan import StepPlan, StepResult
from diptych.engine.core.types import Epoch, WorkerId
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, make_runner
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import BatcherCommand, ClearBlock, CommitBlock
from diptych.server.boot import HostBoot
from diptych.server.collector import calm_collector
from diptych.server.lifeline import die_by_kernel
from diptych.server.logs import configure_logs
from diptych.server.pool_routes import make_porter
from diptych.server.ranks import share_of_cores, start_ranks
from diptych.server.spawn import see_devices
from diptych.transfer.channels import Channels
from diptych.transfer.control_page import ControlPage
from diptych.transfer.core_table import CoreTable, rank_slots
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import PeerMessage, Porter
from diptych.transfer.processes import name_process, process_name

IDLE_S: Final = 0.5
"""An idle worker shows that it lives this often; far below any `hang_s`."""
_FOR_BATCHER: Final = (Join, Assign, Grants, Revoke, SetDial, Seal)

_log = logging.getLogger("diptych")


class StepRunner(Protocol):
    def run(self, plan: StepPlan) -> StepResult: ...


class Worker:
    """The loop of one worker. `run` returns when it is told to end."""

    def __init__(
        self,
        channels: Channels,
        batcher: Batcher,
        runner: StepRunner,
        page: ControlPage,
        slot: int,
        cores: CoreTable,
        porter: Porter | None = None,
    ) -> None:
        self._channels = channels
        self._batcher = batcher
        self._runner = runner
        self._page = page
        self._slot = slot
        self._cores = cores
        self._porter = porter  # None: there is only one memory domain
        self._ended = False

    def run(self) -> None:
        self._page.step_end(self._slot)  # what an earlier incarnation left is not this one's
        self._channels.announce()
        stepped = False
        while not self._ended:
            self._hear(0 if stepped else IDLE_S)
            self._move_blocks()
            stepped = self._step()

    def _hear(self, timeout_s: float) -> None:
        """Only a message, or blocks on their way, can change what there is to do after an empty
        plan: then it may sleep."""
        if self._porter is not None:
            self._channels.watch(self._porter.fds())
            timeout_s = self._porter.due_s(timeout_s)
        for message in self._channels.receive(timeout_s):
            self._handle(message)
        self._page.beat(self._slot)

    def _move_blocks(self) -> None:
        if self._porter is not None:
            self._porter.turn()
            self._carry_out(self._batcher.take())  # what was read is named before the next step

    def _handle(self, message: AnyMessage) -> None:
        if isinstance(message, _FOR_BATCHER):
            self._batcher.handle(message)
        elif isinstance(message, Drain):
            self._ended = True
        elif isinstance(message, PeerMessage) and self._porter is not None:
            self._porter.hear(message)
        else:
            _log.error("dropped a %s, which no worker takes", type(message).__name__)

    def _step(self) -> bool:
        plan = self._batcher.plan()
        self._carry_out(self._batcher.take())
        if plan.empty:
            self._cores.rest(self._slot)  # neighbours compute here until there is work again
            return False
        self._cores.wake(self._slot, self._batcher.dial)
        self._page.step_begin(self._slot)
        try:
            result = self._runner.run(plan)
        except Exception:
            refs = ", ".join(f"{row.seq.ref}" for row in plan.rows)
            _log.error("the step of these sequences failed: %s", refs)
            raise
        self._page.step_end(self._slot)
        self._batcher.commit(plan, result)
        self._carry_out(self._batcher.take_seals())
        self._carry_out(self._batcher.take())
        return True

    def _carry_out(self, commands: list[BatcherCommand]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self._channels.send(command)
            elif isinstance(command, ClearBlock):
                self._page.clear(command.block, command.generation)
            elif isinstance(command, CommitBlock):
                _commit(self._page, command)
            else:
                assert self._porter is not None, "only one memory domain"
                self._porter.order(command)


def _commit(page: ControlPage, command: CommitBlock) -> None:
    page.commit(command.block, command.generation, command.hash, command.parent)


def run_worker(boot: HostBoot, model: LoadedModel, worker: WorkerId, epoch: Epoch) -> None:
    """The life of a forked worker; an exception that leaves here is a fault of this incarnation."""
    me = Address("worker", worker, epoch)
    configure_logs(f"{process_name(me)}.{epoch}", boot.log_level)
    name_process(process_name(me))
    die_by_kernel(boot.lifeline_fd)
    layout = boot.layout
    os.sched_setaffinity(0, layout.cores)  # for its other threads; those that compute are pinned
    slot, spec = layout.slot(worker), layout.spec(worker)
    see_devices(boot.devices, slot)
    home = spec.pool
    page, memory = layout.map_page(home), layout.map_pool(home)

    def beat() -> None:
        page.beat(slot)  # a start that stands still is found out by the supervisor

    beat()
    mine = layout.pool(home)
    pool = KVPool.over(
        memory,
        model.config,
        layout.num_blocks,
        layout.block_size,
        num_parts=mine.num_parts,
        dtype=mine.dtype,
    )
    threads = boot.options.threads or len(layout.cores)
    ranks = start_ranks(boot, spec, epoch, model, pool, threads)  # before there is a thread
    beat()
    batcher = Batcher(
        worker,
        epoch,
        boot.options.batch,
        block_size=layout.block_size,
        eos_token_ids=model.config.eos_token_ids,
        max_model_len=model.config.max_model_len,
    )
    runner = make_runner(
        model, pool, threads, share_of_cores(boot, spec, 0), ranks, page.counter(slot)
    )
    beat()
    channels = Channels(Path(boot.run_dir), me, boot.network)
    porter = None
    if len(layout.pools) > 1 or boot.network is not None:
        own = PoolMemory(memory, page, mine.block_bytes)
        porter = make_porter(boot, me, home, own, model, channels.send, batcher.handle, beat)
    cores = CoreTable(layout.map_cores(), rank_slots(layout.workers))
    calm_collector()
    Worker(channels, batcher, runner, page, slot, cores, porter).run()
    channels.close()
