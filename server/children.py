"""The supervisor's own children: the scheduler, forked, and the API servers, executed.

Owns their fences. Invariant: a child holds no descriptor of the supervisor but those it needs; in
particular never the write end of the lifeline.
"""

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence

from diptych.engine.core.messages import Address
from diptych.server.boot import ApiProcessBoot, HostBoot
from diptych.server.fence import Fence
from diptych.server.launcher import ProcessExited
from diptych.server.lifeline import EXIT_FAULT, cause_of, describe_exit, leave_signals_to_supervisor
from diptych.server.scheduler_process import run_scheduler
from diptych.server.spawn import close_other_fds, give_orders, kill_child, spawn_waiting

_log = logging.getLogger("diptych")


class Children:
    """Used from one thread; no method but `close` blocks."""

    def __init__(self, boot: HostBoot) -> None:
        self._boot = boot
        self._fences: dict[Address, Fence] = {}
        self._spawned: dict[int, subprocess.Popen[bytes]] = {}  # pid -> its handle
        self._prepared: list[subprocess.Popen[bytes]] = []

    def start_scheduler(self, address: Address) -> int:
        """Forked, because all it needs is imported here: it serves again after milliseconds."""
        sys.stderr.flush()
        with warnings.catch_warnings():
            # The only threads here are those of the message sockets, which the child never touches.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self._become_scheduler(address)
        self._watch(address, pid)
        return pid

    def prepare_api(self, target: str, fds: Sequence[int]) -> None:
        """Lets an API server import its code while the model loads; it waits for `start_api`."""
        process = spawn_waiting(
            "diptych.server.api_process", [target], [self._boot.lifeline_fd, *fds]
        )
        self._spawned[process.pid] = process
        self._prepared.append(process)

    def start_api(self, address: Address, boot: ApiProcessBoot) -> int:
        if not self._prepared:
            self.prepare_api(boot.target, boot.api.fds)
        process = self._prepared.pop()
        give_orders(process, boot)
        self._watch(address, process.pid)
        return process.pid

    def kill(self, address: Address) -> None:
        fence = self._fences.get(address)
        if fence is not None:
            fence.kill()

    def fds(self) -> list[int]:
        return [fence.pidfd for fence in self._fences.values() if not fence.exited]

    def reaped(self, pid: int, wait_status: int) -> None:
        process = self._spawned.pop(pid, None)
        if process is not None:
            process.returncode = wait_status
        for fence in self._fences.values():
            if fence.pid == pid:
                fence.wait_status = wait_status

    def num_running(self) -> int:
        return len(self._fences)

    def events(self, now: float) -> list[ProcessExited]:
        events: list[ProcessExited] = []
        for address, fence in list(self._fences.items()):
            if fence.gone(now) and fence.wait_status is not None:
                status = fence.wait_status
                events.append(ProcessExited(address, cause_of(status), describe_exit(status)))
                del self._fences[address]
                fence.close()
        return events

    def close(self) -> None:
        for process in self._prepared:
            kill_child(process)
        for fence in self._fences.values():
            fence.kill()

    def _watch(self, address: Address, pid: int) -> None:
        self._fences[address] = Fence(pid, os.pidfd_open(pid))

    def _become_scheduler(self, address: Address) -> None:
        """Never returns: the supervisor's stack ends here."""
        status = EXIT_FAULT
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            leave_signals_to_supervisor()
            os.setsid()
            pages = {pool.page_fd for pool in self._boot.layout.pools}
            close_other_fds(pages | {self._boot.lifeline_fd, self._boot.layout.pulse_fd})
            run_scheduler(self._boot, address.epoch)
            status = 0
        except BaseException:
            _log.exception("the scheduler ends by an uncaught exception")
        finally:
            sys.stderr.flush()
            os._exit(status)
