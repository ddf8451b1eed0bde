"""What processes are called, in file names, logs and `ps`; how a child ends with its parent.

Owns nothing.
"""

import ctypes
import os
import signal
from pathlib import Path
from typing import Final

from diptych.engine.core.messages import Address

_PR_SET_PDEATHSIG: Final = 1


def process_name(address: Address) -> str:
    """Of a process over all its incarnations: "worker0", "scheduler0", "api0"."""
    return f"{address.kind}{address.number}"


def name_process(name: str) -> None:
    """What `ps` and `top` show of this process in their command column, at most 15 bytes:
    "dt-worker0". For the main thread."""
    Path("/proc/self/comm").write_text(f"dt-{name}"[:15])


def die_with_parent(parent: int) -> None:
    """From now the kernel kills this process when the thread that started it ends, even if this
    one stands still."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
