"""Children whose exit status is read in one place."""

import os
import select
import subprocess
import sys

from diptych.server.spawn import kill_child


def started() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def wait_for_end(pid: int) -> None:
    """Without reaping it."""
    pidfd = os.pidfd_open(pid)
    try:
        assert select.select([pidfd], [], [], 30.0)[0]
    finally:
        os.close(pidfd)


def test_a_killed_child_is_still_there_to_be_reaped() -> None:
    child = started()
    kill_child(child)
    wait_for_end(child.pid)
    kill_child(child)  # it ended, and its parent was not told yet
    pid, status = os.waitpid(-1, os.WNOHANG)
    assert pid == child.pid
    assert os.waitstatus_to_exitcode(status) == -9
    child.returncode = -9
    assert child.stdin is not None
    child.stdin.close()


def test_a_reaped_child_is_left_alone() -> None:
    child = started()
    child.kill()
    assert child.wait() == -9
    kill_child(child)
    assert child.stdin is not None
    child.stdin.close()
