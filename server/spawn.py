"""Starting a Python process of ours: what it may inherit, and how it is told what to do.

Owns nothing. Invariant: a child has its own session (signals of the terminal reach the supervisor
only) and no descriptor but those named; its orders come on standard input.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

import diptych

_DEFAULTS: Final = {"UCX_TLS": "^posix,sysv"}
"""Where the environment does not say it: those ways of UCX leave segments when a process of NIXL
is killed, and data does not take them."""

_log = logging.getLogger("diptych")


def spawn(module: str, boot: msgspec.Struct, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """`python -m module` with `boot` as JSON on its standard input."""
    process = spawn_waiting(module, [], fds)
    give_orders(process, boot)
    return process


def spawn_waiting(module: str, words: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """A process that imports what it needs and then waits for `give_orders`."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *words],
        stdin=subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,
        env=python_environment(),
    )


def give_orders(process: subprocess.Popen[bytes], boot: msgspec.Struct) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died already, which its exit status tells
        process.stdin.write(msgspec.json.encode(boot))
        process.stdin.close()


def kill_child(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a child that the caller reaps itself. `Popen.kill` looks whether it ended, which
    reaps it: whoever waits for its exit status would then wait for ever."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def see_devices(devices: Sequence[str], slot: int) -> None:
    """Before CUDA is touched: this process computes on what was assigned to it alone."""
    if slot < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot]
        _log.info("sees the GPUs %s", devices[slot] or "(none)")


def python_environment() -> dict[str, str]:
    """This environment and our defaults, with this package importable whatever the folder."""
    root = str(Path(diptych.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**_DEFAULTS, **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def close_other_fds(keep: set[int]) -> None:
    """After a fork: lets go of everything that was the parent's."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            with suppress(OSError):  # the descriptor of the listing itself is gone
                os.close(fd)
