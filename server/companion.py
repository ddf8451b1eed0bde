"""A helper process of the supervisor that may end and is started again: the Ray launcher.

Owns that process. Invariant: its end is no reason for anything else to end, once it has served its
purpose for the first time; nothing waits for it.
"""

import logging
import subprocess
from typing import Final

import msgspec

from diptych.server.boot import SupervisorBoot
from diptych.server.lifeline import describe_exit
from diptych.server.ray_plan import RayBoot
from diptych.server.spawn import kill_child, spawn

RESTART_S: Final = 1.0
RESTART_S_MAX: Final = 30.0
CALM_S: Final = 60.0
"""One that lived so long is started again at once."""

_log = logging.getLogger("diptych")


class Companion:
    """Used from one thread; no method blocks."""

    def __init__(self, name: str, module: str, boot: msgspec.Struct, lifeline_fd: int) -> None:
        self.name = name
        self.failures = 0  # in a row
        self._module = module
        self._boot = boot
        self._lifeline_fd = lifeline_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._start_at_s = 0.0

    def tick(self, now: float) -> None:
        if self._process is None and now >= self._start_at_s:
            self._process = spawn(self._module, self._boot, [self._lifeline_fd])
            self._started_s = now

    def reaped(self, pid: int, wait_status: int, now: float) -> None:
        if self._process is None or self._process.pid != pid:
            return
        self._process.returncode = wait_status
        self._process = None
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
            self._process = None


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
        lifeline_fd=lifeline_fd,
        log_level=boot.log_level,
    )
    return Companion("Ray launcher", "diptych.server.ray_launcher", orders, lifeline_fd)
