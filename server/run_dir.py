"""The run directory: the sockets of one server, private to its user.

Owns its life. Invariant: a directory named diptych-* whose lock nobody holds belongs to a server
that is dead, and whoever finds it removes it.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

_PREFIX: Final = "diptych-"
_LOCK: Final = "lock"


def create_run_dir(parent: Path | None = None) -> tuple[Path, int]:
    """A new directory (mode 0700) and the descriptor that holds its lock while it lives."""
    parent = parent or Path(tempfile.gettempdir())
    remove_stale_run_dirs(parent)
    fresh = Path(tempfile.mkdtemp(prefix="new-diptych-", dir=parent))
    lock_fd = os.open(fresh / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = parent / f"{_PREFIX}{fresh.name.removeprefix('new-diptych-')}"
    fresh.rename(path)  # visible under its name only once it is locked
    return path, lock_fd


def remove_run_dir(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def remove_stale_run_dirs(parent: Path) -> None:
    """Removes what servers left that were killed together with all their processes."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # not ours, or another start removes it just now
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_run_dir(path)
        except BlockingIOError:
            pass  # alive
        finally:
            os.close(lock_fd)
