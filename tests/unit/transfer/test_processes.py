"""Names and ends of processes, on real ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from diptych.transfer.processes import name_process
from tests.support.processes import state_of, wait_gone

STOPPED_CHILD = """
import os, signal, sys, time
from diptych.transfer.processes import die_with_parent
parent = os.getpid()
child = os.fork()
if child == 0:
    die_with_parent(parent)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
os.waitid(os.P_PID, child, os.WSTOPPED)
print(child, flush=True)
sys.stdin.read()
"""


def test_a_child_that_stands_still_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED_CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert state_of(child) == "T"
        wait_gone(child, lambda: os.kill(parent.pid, signal.SIGKILL))
        assert state_of(child) in "ZX"


def test_a_long_name_is_cut() -> None:
    before = Path("/proc/self/comm").read_text().strip()
    try:
        name_process("worker1234567890")
        assert Path("/proc/self/comm").read_text().strip() == "dt-worker123456"
    finally:
        Path("/proc/self/comm").write_text(before)
