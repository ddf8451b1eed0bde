"""A worker process: the batcher decides, the runner computes, this loop carries messages between.

Owns the process's channels and its pulse. Invariants: page writes and sends happen in the order the
batcher gave them, and a block's entry is voided before the step that writes it; between steps it
never waits for anyone, and without work it sleeps until a message comes.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    Assign,
    Drain,
    Grant,
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
from diptych.scheduler.commands import ClearBlock, CommitBlock
from diptych.server.boot import HostBoot
from diptych.server.lifeline import die_by_kernel, name_process
from diptych.server.logs import configure_logs
from diptych.transfer.channels import Channels, process_name
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.shared_memory import SharedMemory

IDLE_S: Final = 0.5
"""An idle worker shows that it lives this often; far below any `hang_s`."""
_FOR_BATCHER: Final = (Join, Assign, Grant, Revoke, SetDial, Seal)

_log = logging.getLogger("diptych")


class StepRunner(Protocol):
    def run(self, plan: StepPlan, on_layer: Callable[[], None] | None = None) -> StepResult: ...


class Worker:
    """The loop of one worker. `run` returns when it is told to end."""

    def __init__(
        self, channels: Channels, batcher: Batcher, runner: StepRunner, page: ControlPage, slot: int
    ) -> None:
        self._channels = channels
        self._batcher = batcher
        self._runner = runner
        self._page = page
        self._slot = slot
        self._ended = False

    def run(self) -> None:
        self._page.step_end(self._slot)  # what an earlier incarnation left is not this one's
        self._channels.announce()
        stepped = False
        while not self._ended:
            self._hear(0 if stepped else IDLE_S)
            stepped = self._step()

    def _hear(self, timeout_s: float) -> None:
        """Only a message can change what there is to do after an empty plan: then it may sleep."""
        for message in self._channels.receive(timeout_s):
            self._handle(message)
        self._page.beat(self._slot)

    def _handle(self, message: AnyMessage) -> None:
        if isinstance(message, _FOR_BATCHER):
            self._batcher.handle(message)
        elif isinstance(message, Drain):
            self._ended = True
        else:
            _log.error("dropped a %s, which no worker takes", type(message).__name__)

    def _step(self) -> bool:
        plan = self._batcher.plan()
        self._carry_out()
        if plan.empty:
            return False
        self._page.step_begin(self._slot)
        try:
            result = self._runner.run(plan, self._beat)
        except Exception:
            refs = ", ".join(f"{row.seq.ref}" for row in plan.rows)
            _log.error("the step of these sequences failed: %s", refs)
            raise
        self._page.step_end(self._slot)
        self._batcher.commit(plan, result)
        self._carry_out()
        return True

    def _carry_out(self) -> None:
        for command in self._batcher.take():
            if isinstance(command, Send):
                self._channels.send(command)
            elif isinstance(command, ClearBlock):
                self._page.clear(command.block, command.generation)
            else:
                _commit(self._page, command)

    def _beat(self) -> None:
        self._page.beat(self._slot)


def _commit(page: ControlPage, command: CommitBlock) -> None:
    page.commit(command.block, command.generation, command.hash, command.parent)


def run_worker(boot: HostBoot, model: LoadedModel, worker: WorkerId, epoch: Epoch) -> None:
    """The life of a forked worker; an exception that leaves here is a fault of this incarnation."""
    me = Address("worker", worker, epoch)
    configure_logs(f"{process_name(me)}.{epoch}", boot.log_level)
    name_process(process_name(me))
    die_by_kernel(boot.lifeline_fd)
    layout = boot.layout
    num_pulses = layout.num_workers + 1
    page_len = page_bytes(layout.num_blocks, num_pulses)
    page_memory = SharedMemory(layout.page_fd, page_len)
    page = ControlPage(page_memory.view, layout.num_blocks, num_pulses)
    pool_memory = SharedMemory(layout.pool_fd, layout.pool_bytes)
    pool = KVPool.over(pool_memory.view, model.config, layout.num_blocks, layout.block_size)
    batcher = Batcher(
        worker,
        epoch,
        boot.options.batch,
        block_size=layout.block_size,
        eos_token_ids=model.config.eos_token_ids,
        max_model_len=model.config.max_model_len,
    )
    threads = boot.options.worker_threads(len(os.sched_getaffinity(0)))
    runner = make_runner(model, pool, threads)
    channels = Channels(Path(boot.run_dir), me)
    Worker(channels, batcher, runner, page, worker).run()
    channels.close()
