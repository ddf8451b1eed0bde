"""A machine that others use too, held for a while at a time.

Owns at most one process of the command that holds it. Invariant: between `take` and `release` that
process lives, unless the command itself gave up.
"""

import shlex
import subprocess
import time


class Hold:
    """`command` must run what is appended to it, when it is its turn: `flock FILE`, for example.
    None: nothing to hold."""

    def __init__(self, command: str | None, hold_s_max: float) -> None:
        self._command = command
        self._hold_s_max = hold_s_max
        self._holder: subprocess.Popen[bytes] | None = None
        self._since_s = 0.0

    def take(self, need_s: float) -> None:
        """Holds the machine on return, for `need_s` more; lets others go first when that is more
        than the rest of a turn."""
        if self._command is None:
            return
        if self._holder is not None:
            if time.monotonic() + need_s < self._since_s + self._hold_s_max:
                return
            self.release()
        words = [*shlex.split(self._command), "sh", "-c", "echo; exec cat"]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise RuntimeError(f"{self._command} did not run")
        self._since_s = time.monotonic()

    def release(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait()
            self._holder = None
