"""How the processes of a host end with their supervisor, and how one's end is seen.

The lifeline is a pipe whose only write end is the supervisor's: when the supervisor is gone, for
whatever reason, every holder of the read end learns it from the kernel. Owns nothing. Invariant:
no process of a host outlives its supervisor by more than a moment, not even one that computes.
"""

import fcntl
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Final

from diptych.engine.core.types import DownCause
from diptych.transfer.processes import prctl

EXIT_FAULT: Final = 70
"""Exit status of a process of ours that ended by an uncaught exception."""

_PR_SET_CHILD_SUBREAPER: Final = 36
_F_SETSIG: Final = 10
_FAULT_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGILL}
)


def die_by_kernel(lifeline_fd: int) -> None:
    """From now the kernel kills this process when the supervisor ends; no thread is needed.

    For processes that compute (a thread of theirs may wait long for the interpreter) or that fork.
    """
    # The owner of the signal belongs to the open file: each process needs one of its own.
    own = os.open(f"/proc/self/fd/{lifeline_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline_ended(own):  # it ended before the signal was armed
        os.kill(os.getpid(), signal.SIGKILL)


def die_by_thread(lifeline_fd: int, before: Callable[[], None]) -> None:
    """The same with a thread that may still do something short first."""

    def wait() -> None:
        while os.read(lifeline_fd, 1):
            pass
        try:
            before()
        finally:
            os._exit(EXIT_FAULT)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def lifeline_ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def leave_signals_to_supervisor() -> None:
    """A service manager tells every process of a group to end; only the supervisor answers, by a
    drain, and the others go on until it ends them (with SIGKILL, or over their channels)."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children, so that it can reap them."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def cause_of(wait_status: int) -> DownCause:
    """A crash by own fault, or an end from outside."""
    if os.WIFSIGNALED(wait_status):
        fault = os.WTERMSIG(wait_status) in _FAULT_SIGNALS
    else:
        fault = os.WEXITSTATUS(wait_status) == EXIT_FAULT
    return DownCause.FAULT if fault else DownCause.KILLED


def describe_exit(wait_status: int) -> str:
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        return f"signal {number} ({signal.strsignal(number)})"
    return f"exit status {os.WEXITSTATUS(wait_status)}"
