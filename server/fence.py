"""Killing one process group and knowing that it is gone.

Owns the pidfd of one process. Invariant: `gone` is true only after the process was reaped (its
status is known, or nobody will ever tell it) and no member of its group is left.
"""

import os
import select
import signal
from contextlib import suppress
from typing import Final

STATUS_S_MAX: Final = 0.5
"""So long the exit status of a process that is gone is waited for: its parent may be gone too."""


class Fence:
    """Of a process that leads its own process group."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.wait_status: int | None = None
        self._exited_s: float | None = None

    @property
    def exited(self) -> bool:
        return self._exited_s is not None

    def kill(self) -> None:
        """Both ways: the group may not exist yet, just after the fork."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._kill_group()

    def gone(self, now: float) -> bool:
        """Kills what the process left behind once it is seen to be dead."""
        if self._exited_s is None:
            if not _readable(self.pidfd):
                return False
            self._exited_s = now
            self._kill_group()
        if self.wait_status is None and now - self._exited_s <= STATUS_S_MAX:
            return False
        return not self._group_exists()

    def close(self) -> None:
        os.close(self.pidfd)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _group_exists(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
