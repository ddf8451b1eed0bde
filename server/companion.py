"""A helper process of the supervisor that may end and is started again: the Ray launcher.

Owns that process, and what it was ordered. Invariant: its end is no reason for anything else to
end, once it has served its purpose for the first time; nothing waits for it; a new one hears the
last order.
"""

import logging
import os
import subprocess
from contextlib import suppress
from typing import Final

import msgspec

from diptych.engine.core.config import EngineOptions
from diptych.server.boot import SupervisorBoot
from diptych.server.lifeline import describe_exit
from diptych.server.ray_plan import POOLS, RayBoot, RayOrder
from diptych.server.spawn import kill_child, spawn

RESTART_S: Final = 1.0
RESTART_S_MAX: Final = 30.0
GIVEN_BACK_MAX: Final = 16
"""Places named in an order: by then the launcher has heard of the older ones."""
CALM_S: Final = 60.0
"""One that lived so long is started again at once."""

_log = logging.getLogger("diptych")


class Companion:
    """Used from one thread; no method blocks."""

    def __init__(self, name: str, module: str, boot: RayBoot, lifeline_fd: int) -> None:
        self.name = name
        self.failures = 0  # in a row
        self._module = module
        self._boot = boot
        self._lifeline_fd = lifeline_fd
        self._orders_fd: int | None = None  # of a launcher of elastic hosts
        self._order: RayOrder | None = None
        self._told = True
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._start_at_s = 0.0

    def tick(self, now: float) -> None:
        if self._process is None and now >= self._start_at_s:
            self._spawn()
            self._started_s = now
        if not self._told and self._orders_fd is not None and self._order is not None:
            with suppress(BlockingIOError, BrokenPipeError):  # then in the next turn, or the next
                os.write(self._orders_fd, msgspec.json.encode(self._order) + b"\n")
                self._told = True

    def order(self, count: int | None = None, given_back: str | None = None) -> None:
        """Elastic hosts: so many are wanted, or this one is not any more."""
        known = self._order or RayOrder(0, [])
        places = known.given_back if given_back is None else [*known.given_back, given_back]
        self._order = RayOrder(known.count if count is None else count, places[-GIVEN_BACK_MAX:])
        self._told = False

    def _spawn(self) -> None:
        fds, boot = [self._lifeline_fd], self._boot
        if boot.roles:
            theirs, self._orders_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            fds.append(theirs)
            boot = msgspec.structs.replace(boot, orders_fd=theirs)
            self._told = False
        self._process = spawn(self._module, boot, fds)
        for fd in fds[1:]:
            os.close(fd)

    def _let_go(self) -> None:
        self._process = None
        if self._orders_fd is not None:
            os.close(self._orders_fd)
            self._orders_fd = None

    def reaped(self, pid: int, wait_status: int, now: float) -> None:
        if self._process is None or self._process.pid != pid:
            return
        self._process.returncode = wait_status
        self._let_go()
        self.failures = 0 if now - self._started_s > CALM_S else self.failures + 1
        wait_s = min(RESTART_S_MAX, RESTART_S * 2.0 ** min(self.failures, 10))
        self._start_at_s = now + wait_s
        how = describe_exit(wait_status)
        _log.warning("%s ended: %s; it starts again in %g s", self.name, how, wait_s)

    def close(self) -> None:
        """Its actors end with it."""
        if self._process is not None:
            kill_child(self._process)
            self._process.wait()
            self._let_go()


def ray_companion(boot: SupervisorBoot, head: str, lifeline_fd: int) -> Companion | None:
    """The Ray launcher of a head at `head`; None without Ray."""
    cluster, options = boot.cluster, boot.options
    if cluster is None or cluster.ray is None:
        return None
    orders = RayBoot(
        ray=cluster.ray,
        head=head,
        secret=cluster.network.secret,
        model=cluster.model,
        counts={"prefill": options.prefill, "decode": options.decode, "mixed": options.mixed},
        roles=_roles(options) if options.elastic_hosts else [],
        lifeline_fd=lifeline_fd,
        log_level=boot.log_level,
    )
    return Companion("Ray launcher", "diptych.server.ray_launcher", orders, lifeline_fd)


def _roles(options: EngineOptions) -> list[str]:
    """Of each place for a worker."""
    names = {100: POOLS[0], 0: POOLS[1], 50: POOLS[2]}
    return [names[spec.dial] for spec in options.workers()]
