"""The end of a supervisor as its processes see it: also while they compute, or are stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.engine.core.types import DownCause
from diptych.server.lifeline import EXIT_FAULT, cause_of
from diptych.server.spawn import python_environment

WAIT_S = 30.0
BY_KERNEL = "import sys; from diptych.server.lifeline import *; die_by_kernel(int(sys.argv[1]))\n"
BY_THREAD = (
    "import sys; from pathlib import Path; from diptych.server.lifeline import *\n"
    "die_by_thread(int(sys.argv[1]), Path(sys.argv[2]).touch)\n"
)
REPORT = "print('armed', flush=True)\n"
SPIN = "while True: pass\n"


def start(program: str, read_fd: int, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(read_fd), *arguments],
        pass_fds=[read_fd],
        stdout=subprocess.PIPE,
        env=python_environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"armed\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize("stopped", [False, True])
def test_the_kernel_kills_all_holders(stopped: bool) -> None:
    read_fd, write_fd = os.pipe()
    processes = [start(BY_KERNEL + REPORT + SPIN, read_fd) for _ in range(2)]
    os.close(read_fd)
    if stopped:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
    os.close(write_fd)
    assert [process.wait(WAIT_S) for process in processes] == [-signal.SIGKILL] * 2


def test_a_lifeline_that_ended_before(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    program = REPORT + BY_KERNEL + SPIN
    assert start(program, read_fd).wait(WAIT_S) == -signal.SIGKILL
    os.close(read_fd)


def test_a_thread_may_clean_up_first(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    process = start(BY_THREAD + REPORT + SPIN, read_fd, str(tmp_path / "cleaned"))
    os.close(read_fd)
    os.close(write_fd)
    assert process.wait(WAIT_S) == EXIT_FAULT
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    ("wait_status", "cause"),
    [
        (signal.SIGKILL, DownCause.KILLED),
        (signal.SIGTERM, DownCause.KILLED),
        (signal.SIGSEGV | 0x80, DownCause.FAULT),  # with a core dump
        (signal.SIGABRT, DownCause.FAULT),
        (signal.SIGBUS, DownCause.FAULT),
        (signal.SIGFPE, DownCause.FAULT),
        (signal.SIGILL, DownCause.FAULT),
        (0, DownCause.KILLED),
        (1 << 8, DownCause.KILLED),
        (EXIT_FAULT << 8, DownCause.FAULT),
    ],
)
def test_causes(wait_status: int, cause: DownCause) -> None:
    assert cause_of(wait_status) is cause
